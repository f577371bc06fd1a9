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

from hooked_mllm.errors import InputError, UnsupportedModelError, nearest
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
    """The transformers model in eval mode, its parameters frozen, and its processor (None without processor files).

    Arguments as for `HookedMLLM.from_pretrained`; `attention` is a name, or names by tower.
    """
    kwargs = _checked(kwargs, device, device_map) | {"dtype": _dtype(dtype)}
    if isinstance(attention, Mapping):
        if not attention or attention.keys() - _TOWERS.keys():  # transformers ignores the names of other towers
            raise InputError(
                f"attention= names an implementation for 'text', 'vision' or both; got {sorted(attention)}."
            )
        kwargs["attn_implementation"] = {_TOWERS[tower]: name for tower, name in attention.items()}
    elif attention is not None:
        kwargs["attn_implementation"] = attention
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
    resolved = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in _DTYPES.values():
        names = ("bfloat16", "float16", "float32", "auto")
        hint = nearest(dtype, names) if isinstance(dtype, str) else ""
        raise InputError(f"dtype is one of {', '.join(names)}; got {str(dtype)!r}. {hint}".rstrip())
    return resolved


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
        local, remote = "has a config.json that cannot be read", "is neither a folder nor found on the hub"
        raise InputError(f"{source!r} {local if Path(source).is_dir() else remote}: {error}") from error
    model_type = config.get("model_type")
    try:
        family = family_of(SimpleNamespace(model_type=model_type))
    except UnsupportedModelError as error:
        needs_code = model_type != "internvl_chat" and "auto_map" in config
        reason = "needs its own code, which this package never runs" if needs_code else "cannot be loaded"
        raise UnsupportedModelError(f"{source!r} {reason}. {error}") from error
    supported, got = family.model_classes, config.get("architectures") or []
    if got and not set(got) & set(supported):
        raise UnsupportedModelError(
            f"{source!r} contains a {', '.join(got)}; for {model_type!r} this package supports {', '.join(supported)}."
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
    quiet = {f"_raise_exceptions_for_{case}": False for case in ("missing_entries", "connection_errors")}
    where = {name: value for name, value in safe.items() if name == "revision"}
    if not any(cached_file(source, file, **quiet, **where) for file in _PROCESSOR_FILES):
        return None
    try:
        processor = AutoProcessor.from_pretrained(source, **safe)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"The processor of {source!r} cannot be loaded: {error}") from error
    return processor if isinstance(processor, ProcessorMixin) else None
