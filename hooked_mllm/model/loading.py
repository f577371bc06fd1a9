"""Loading a checkpoint: safetensors only, classes of transformers only, no code from the checkpoint."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import is_peft_available

from hooked_mllm.checks import as_device
from hooked_mllm.errors import HookedMLLMError, InputError, UnsupportedModelError, nearest
from hooked_mllm.families.registry import family_of
from hooked_mllm.model.checkpoint_files import CheckpointFiles, check_quantization, quantization_of
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
_ADAPTER = "adapter_config.json"
#: arguments of transformers about where the files are
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "subfolder", "token")
_UNKNOWN = ("from_tf", "from_flax")
_IGNORED = ("trust_remote_code", "use_safetensors", "output_loading_info", "ignore_mismatched_sizes")
#: arguments of transformers that have another name or place here
_ELSEWHERE = {
    "attn_implementation": "specify the attention with attention=, which takes the same values",
    "torch_dtype": "specify the type with dtype=, which takes the same values",
    "adapter_kwargs": "load the adapter with peft and pass the model to `HookedMLLM.from_model`",
    "return_dict": "results of the model are read by name",
    "state_dict": "the weights are those of the checkpoint; pass a model in memory to `HookedMLLM.from_model`",
}


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
    local = Path(source).is_dir()
    subfolder = kwargs.get("subfolder", "")
    if not isinstance(subfolder, str) or (local and (revision is not None or subfolder)):
        _check_local(source, revision, subfolder)
    where = {"revision": revision} if revision is not None else {}
    where |= {name: kwargs.pop(name) for name in _HUB if name in kwargs}
    files = CheckpointFiles(source, where)
    config = _check_config(source, where)
    quantized = quantization_of(source, config) is not None
    if (quantization := kwargs.get("quantization_config")) is not None:
        check_quantization(source, quantization)
    kinds = files.check_weights(config, kwargs.get("variant"), quantized=quantized)
    safe = {"trust_remote_code": False, **where}
    no_adapter = {"subfolder": "no adapter"}  # with one, transformers reports the keys of the adapter alone
    with _loading(source):
        load: Any = AutoModelForImageTextToText.from_pretrained
        model, report = load(
            source, use_safetensors=True, output_loading_info=True, adapter_kwargs=no_adapter, **safe, **kwargs
        )
    _check_report(source, type(model).__name__, report)
    if quantized or quantization is not None:
        files.check_quantized(model, kinds)
    if files.find(_ADAPTER) is not None:
        _load_adapter(files, model)
    if device is not None:
        model = model.to(as_device(device))
    return model.eval().requires_grad_(False), _processor(files, safe)


@contextmanager
def _loading(source: str, part: str = "") -> Iterator[None]:
    """Report what transformers raises for a damaged checkpoint or for wrong arguments as an `InputError`."""
    try:
        yield
    except (HookedMLLMError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # tokenizers and safetensors raise errors of their own kinds
        raise InputError(f"{part}{source!r} cannot be loaded: {error}") from error


def _is_on(option: object) -> bool:
    return option is not None and option is not False


def _check_report(source: str, name: str, report: Mapping[str, Any]) -> None:
    missing, unexpected = (sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys"))
    if missing:
        raise InputError(
            f"{source!r} lacks {len(missing)} of the weights of {name}, such as {', '.join(missing[:3])}: they would "
            "be random. The checkpoint is incomplete or of another class."
        )
    if unexpected:
        raise InputError(
            f"{source!r} has {len(unexpected)} weights that {name} does not have, such as "
            f"{', '.join(unexpected[:3])}: they would be left out. Its config.json is of another checkpoint, or has "
            "fewer layers."
        )
    other = [*sorted(map(str, report.get("mismatched_keys", ()))), *report.get("error_msgs", ())]
    if other:
        raise InputError(f"{source!r} has weights that do not fit {name}: {'; '.join(other[:3])}.")


def _load_adapter(files: CheckpointFiles, model: Any) -> None:
    """Load the adapter next to the weights, as transformers does where peft is installed, and warn."""
    if files.find("adapter_model.safetensors") is None:
        raise UnsupportedModelError(
            f"{files.source!r} contains {_ADAPTER} without adapter_model.safetensors, and other files of weights can "
            f"run code. Remove {_ADAPTER} to load the model without the adapter."
        )
    loads = is_peft_available()
    if loads:
        with _loading(files.source, "The adapter of "):
            model.load_adapter(files.source, **files.where)
    warnings.warn(
        f"{files.source!r} also contains an adapter ({_ADAPTER}), which is {'' if loads else 'not '}loaded"
        f"{'' if loads else ', because peft is not installed'}. Remove it to load the model without it; "
        "`merge_and_unload` of peft makes it a part of the weights.",
        stacklevel=4,
    )


def _check_local(source: str, revision: str | None, subfolder: object) -> None:
    if not isinstance(subfolder, str) or subfolder:
        raise InputError(f"subfolder= is of the hub; pass the path of the folder in {source!r}. Got {subfolder!r}.")
    if revision != Path(source).resolve().name or Path(source).resolve().parent.name != "snapshots":
        raise InputError(
            f"revision= is a branch, tag or commit of the hub, and {source!r} is a folder, whose revision is unknown; "
            f"got {revision!r}. Leave it out."
        )


def _checked(
    kwargs: dict[str, Any], device: str | torch.device | None, device_map: str | Mapping[str, Any] | None
) -> dict[str, Any]:
    if device is not None and device_map is not None:
        raise InputError(
            "Give device= or device_map=, not both: one moves the whole model to a device, the other spreads it. Got "
            f"device={device!r}, device_map={device_map!r}."
        )
    if _is_on(kwargs.get("trust_remote_code")):
        raise UnsupportedModelError("Code from checkpoints is never run here: leave trust_remote_code out.")
    if kwargs.get("use_safetensors") is False or kwargs.get("gguf_file") is not None:
        raise UnsupportedModelError("Only safetensors are read here, because other weight files can run code.")
    if _is_on(kwargs.get("ignore_mismatched_sizes")):
        raise InputError(
            "Leave ignore_mismatched_sizes out: weights of another size than the model's would be replaced by random "
            "ones."
        )
    for name in kwargs:
        if name.startswith("_") or (name in _UNKNOWN and _is_on(kwargs[name])):
            raise InputError(f"Leave {name}= out: it is no option of `from_pretrained` here.")
    for name, advice in _ELSEWHERE.items():
        if kwargs.get(name) is not None:
            raise InputError(f"Leave {name}= out: {advice}.")
    return {k: v for k, v in kwargs.items() if k not in _IGNORED + _UNKNOWN}


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
    try:
        folder = Path(name).expanduser()
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long; the home of an unknown user; a null byte
        raise InputError(f"{name[:100]!r} is neither a path nor a hub id: {str(error)[:100].rstrip('.')}.") from error
    if name and is_folder:
        if not (folder / "config.json").is_file():
            adapter = (folder / _ADAPTER).is_file()
            advice = "load the model and the adapter with peft, and pass `merge_and_unload()` to `from_model`"
            what = f"but an adapter: {advice}" if adapter else "and is not a checkpoint"
            raise InputError(f"The folder {str(folder)!r} has no config.json, {what}.")
        return str(folder)
    if is_file:
        raise InputError(f"{name!r} is a file: give the folder of the checkpoint.")
    parts = name.split("/")
    if not isinstance(path_or_id, str) or name[:1] in ("/", ".", "~", "") or len(parts) != 2 or not all(parts):
        raise InputError(
            f"No folder at {name!r}, and it is no hub id either: those read 'organisation/name', such as "
            "'Qwen/Qwen3-VL-4B-Instruct'."
        )
    return name


def _check_config(source: str, where: dict[str, Any]) -> dict[str, Any]:
    try:
        config, _ = PreTrainedConfig.get_config_dict(source, **where)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        local, remote = "has a config.json that cannot be read", "is neither a folder nor found on the hub"
        raise InputError(f"{source!r} {local if Path(source).is_dir() else remote}: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"config.json of {source!r} is damaged: expected a dictionary, got {config!r:.80}.")
    model_type, got = config.get("model_type"), config.get("architectures") or []
    names = got if isinstance(got, list) else [None]
    if not all(isinstance(name, str) for name in (model_type or "", *names)):
        raise InputError(
            f"config.json of {source!r} is damaged: model_type is a name and architectures a list of names; got "
            f"{model_type!r:.80} and {got!r:.80}. Download it again."
        )
    try:
        family = family_of(SimpleNamespace(model_type=model_type))
    except UnsupportedModelError as error:
        needs_code = model_type != "internvl_chat" and "auto_map" in config
        reason = "needs its own code, which this package never runs" if needs_code else "cannot be loaded"
        raise UnsupportedModelError(f"{source!r} {reason}. {error}") from error
    supported = family.model_classes
    if got and not set(got) & set(supported):
        raise UnsupportedModelError(
            f"{source!r} contains a {', '.join(got)}; for {model_type!r} this package supports {', '.join(supported)}."
        )
    return config


def _processor(files: CheckpointFiles, safe: dict[str, Any]) -> ProcessorMixin | None:
    if not any(files.find(name) for name in _PROCESSOR_FILES):
        return None
    with _loading(files.source, "The processor of "):
        processor = AutoProcessor.from_pretrained(files.source, **safe)
    return processor if isinstance(processor, ProcessorMixin) else None
