"""Loading a checkpoint: safetensors only, classes of transformers only, no code from the checkpoint."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from hooked_mllm.errors import HookedMLLMError, InputError, UnsupportedModelError, nearest
from hooked_mllm.families.registry import family_of
from hooked_mllm.toys.checkpoint import resolve

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_TOWERS = {"text": "text_config", "vision": "vision_config"}
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def load_model(
    path_or_id: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    attention: str | Mapping[str, str] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, ProcessorMixin | None]:
    """The transformers model in eval mode, its parameters frozen, and its processor.

    Parameters are frozen (`requires_grad` false) because gradients are taken of activations here; ask for those of
    parameters with `model.hf_model.requires_grad_(True)`.

    Args:
        path_or_id: A folder, a hub id "organisation/name", or the name of a bundled toy.
        dtype: "bfloat16", "float16", "float32", or "auto" for that of the checkpoint.
        device: The device of the whole model.
        device_map: Spread the model over devices instead, as transformers does ("auto" needs `accelerate`).
        revision: A branch, tag or commit of the hub.
        attention: An attention implementation of transformers, such as "sdpa", for both towers, or
            {"text": ..., "vision": ...}.
        **kwargs: For transformers' `from_pretrained`.

    Returns:
        The model, and its processor; `None` if the checkpoint has no processor files.

    Raises:
        InputError: no such folder or checkpoint, damaged files, contradictory arguments.
        UnsupportedModelError: another kind of model, one that needs its own code, or weights that are not safetensors.
    """
    kwargs = _checked(kwargs, device, device_map) | {"dtype": _dtype(dtype)}
    if attention is not None:
        kwargs["attn_implementation"] = _attention(attention)
    if device_map is not None:
        kwargs["device_map"] = device_map
    source = _locate(path_or_id)
    where = {"revision": revision} if revision is not None else {}
    _check_config(source, where)
    _check_weights(source)
    safe = {"trust_remote_code": False, **where}
    try:
        load: Any = AutoModelForImageTextToText.from_pretrained
        model, report = load(source, use_safetensors=True, output_loading_info=True, **safe, **kwargs)
    except SafetensorError as error:
        raise InputError(f"The weights of {source!r} are damaged: {error}. Download them again.") from error
    except OSError as error:
        raise InputError(f"{source!r} cannot be loaded: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{source!r} lacks {len(missing)} of the weights of {type(model).__name__}, such as "
            f"{', '.join(missing[:3])}: they would be random. The checkpoint is incomplete or of another class."
        )
    if device is not None:
        model = model.to(device)
    return model.eval().requires_grad_(False), _processor(source, safe)


def _checked(
    kwargs: dict[str, Any], device: str | torch.device | None, device_map: str | Mapping[str, Any] | None
) -> dict[str, Any]:
    if device is not None and device_map is not None:
        raise InputError(
            "Give device= or device_map=, not both: one moves the whole model to a device, the other spreads it. Got "
            f"device={device!r}, device_map={device_map!r}."
        )
    if kwargs.get("trust_remote_code"):
        raise UnsupportedModelError("Code from checkpoints is never run here: leave trust_remote_code out.")
    if kwargs.get("use_safetensors") is False:
        raise UnsupportedModelError("Only safetensors are read here, because other weight files can run code.")
    if "attn_implementation" in kwargs:
        raise InputError("Specify the attention with attention=, which takes the values of attn_implementation=.")
    return {k: v for k, v in kwargs.items() if k not in ("trust_remote_code", "use_safetensors", "output_loading_info")}


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto":
        return dtype
    found = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        names = ("bfloat16", "float16", "float32", "auto")
        hint = nearest(dtype, names) if isinstance(dtype, str) else ""
        raise InputError(f"dtype is one of {', '.join(names)}; got {str(dtype)!r}. {hint}".rstrip())
    return found


def _attention(attention: str | Mapping[str, str]) -> str | dict[str, str]:
    if isinstance(attention, str):
        return attention
    unknown = [name for name in attention if name not in _TOWERS]
    if unknown or not attention:  # transformers ignores a name that it does not know
        raise InputError(f"attention= names an implementation for 'text', 'vision' or both; got {sorted(attention)}.")
    return {_TOWERS[name]: value for name, value in attention.items()}


def _locate(path_or_id: str | os.PathLike[str]) -> str:
    name = resolve(str(path_or_id))
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"The folder {str(folder)!r} has no config.json: it is not a checkpoint.")
        return str(folder)
    if folder.is_file():
        raise InputError(f"{name!r} is a file: give the folder of the checkpoint.")
    parts = name.split("/")
    if not isinstance(path_or_id, str) or name[:1] in ("/", ".", "~", "") or len(parts) != 2 or not all(parts):
        raise InputError(
            f"No folder at {name!r}, and it is no hub id either: those read 'organisation/name', such as "
            "'Qwen/Qwen3-VL-4B-Instruct'."
        )
    return name


def _check_config(source: str, where: dict[str, str]) -> None:
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, **where)
    except (OSError, ValueError) as error:
        here = (
            "has a config.json that cannot be read"
            if Path(source).is_dir()
            else "is neither a folder nor found on the hub"
        )
        raise InputError(f"{source!r} {here}: {error}") from error
    model_type = config.get("model_type")
    try:
        family = family_of(SimpleNamespace(model_type=model_type))
    except UnsupportedModelError as error:
        if model_type != "internvl_chat" and "auto_map" in config:
            raise UnsupportedModelError(
                f"{source!r} needs its own code, which this package never runs. {error}"
            ) from error
        raise UnsupportedModelError(f"{source!r} cannot be loaded. {error}") from error
    except HookedMLLMError:
        raise
    wanted, got = family.model_classes, config.get("architectures") or []
    if got and not set(got) & set(wanted):
        raise UnsupportedModelError(
            f"{source!r} contains a {', '.join(got)}; for {model_type!r} this package supports {', '.join(wanted)}."
        )


def _check_weights(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    other = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5") for p in folder.glob(kind))
    if other:
        raise UnsupportedModelError(
            f"{source!r} has its weights in {', '.join(other[:3])}, which are pickles and can run code; only "
            "safetensors are read. Save the model again with `save_pretrained`, or take a revision that has "
            "safetensors."
        )
    raise InputError(f"{source!r} has no weights: no *.safetensors file in the folder.")


def _processor(source: str, safe: dict[str, Any]) -> ProcessorMixin | None:
    quiet = {name: value for name, value in safe.items() if name == "revision"}
    files = [
        cached_file(
            source,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **quiet,
        )
        for file in _PROCESSOR_FILES
    ]
    if not any(files):
        return None
    try:
        processor = AutoProcessor.from_pretrained(source, **safe)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"The processor of {source!r} cannot be loaded: {error}") from error
    return processor if isinstance(processor, ProcessorMixin) else None
