"""What the files of a checkpoint are, before they are loaded: safetensors, in its folder, of known types."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils import cached_file

from hooked_mllm.errors import InputError, UnsupportedModelError, nearest
from hooked_mllm.storage import inside

#: endings of the files that transformers reads from a folder
_READ = (".json", ".safetensors", ".jinja", ".txt", ".model")
_FLOATS = ("F64", "F32", "F16", "BF16")
_ADVICE = "Copy the files into the folder of the checkpoint."
_PICKLES = "pickles and can run code; only safetensors are read. Save the model again with `save_pretrained`, or take a"


class CheckpointFiles:
    """The files of a local folder or of a model on the hub.

    Args:
        source: The folder or the hub id.
        where: Arguments of transformers for the hub, such as `revision`.
    """

    def __init__(self, source: str, where: Mapping[str, Any]) -> None:
        self.source, self.where = source, where
        self.folder = Path(source) if Path(source).is_dir() else None
        self.root = self.folder
        if self.folder is not None:
            resolved = self.folder.resolve()
            if resolved.parent.name == "snapshots" and resolved.parents[1].name.startswith("models--"):
                self.root = resolved.parents[1]  # in the cache of the hub, files are links to a folder next to it
            for pattern in ("*", "additional_chat_templates/*"):
                for file in self.folder.glob(pattern):
                    if file.name.endswith(_READ):
                        self.find(str(file.relative_to(self.folder)))

    def find(self, name: str) -> Path | None:
        """The path of a file, from the folder or the hub; None if there is none."""
        parts = PurePosixPath(name).parts
        if ".." in parts or name.startswith(("/", "\\")):
            raise InputError(f"{self.source!r} names the file {name!r}, which is outside it. {_ADVICE}")
        if self.folder is not None:
            path = inside(self.folder, name, root=self.root, advice=_ADVICE)
            return path if path.is_file() else None
        quiet = {f"_raise_exceptions_for_{case}": False for case in ("missing_entries", "connection_errors")}
        found = cached_file(self.source, name, **quiet, **self.where)
        return None if found is None else Path(found)

    def check_weights(self, config: Mapping[str, Any], variant: str | None, *, quantized: bool) -> dict[str, str]:
        """Raise for weights that are not safetensors, outside the folder, absent, in two files, or not numbers.

        Returns their types by name; under a quantization, those that are not floats are left to `check_quantized`.
        """
        part = f".{variant}" if variant else ""
        names = (f"model{part}.safetensors", f"model.safetensors.index{part}.json")
        if config.get("transformers_weights") is not None:
            names = (self._safetensors(config["transformers_weights"], "config.json"),)
        file = next((path for name in names if (path := self.find(name)) is not None), None)
        if file is None:
            raise self._absent(names)
        shards = [file]
        if file.name.endswith(".json"):
            shards = [self._shard(name, file.name) for name in sorted(set(self._weight_map(file).values()))]
        kept: dict[str, Path] = {}
        kinds: dict[str, str] = {}
        for shard in shards:
            for key, kind in _types(shard).items():
                if key in kept:
                    raise InputError(f"The weight {key!r} of {self.source!r} is in {kept[key].name} and {shard.name}.")
                kept[key], kinds[key] = shard, kind
                if not (quantized or _is_float(key, kind)):
                    raise self._not_floats(key, kind, "its config.json has no quantization_config")
        return kinds

    def check_quantized(self, model: Any, kinds: Mapping[str, str]) -> None:
        """Raise unless transformers quantized the model, and weights that are not floats are the quantizer's."""
        quantizer = getattr(model, "hf_quantizer", None)
        # transformers deletes the quantizer and the settings of a model that it dequantized, not of one it ignored
        dense = quantizer is None and getattr(model.config, "quantization_config", None) is None
        if quantizer is None and not (dense and any("scale" in key for key in kinds)):
            raise UnsupportedModelError(
                f"{self.source!r} specifies a quantization that transformers did not apply: load the unquantized "
                "checkpoint."
            )
        modules = dict(model.named_modules())
        scaled = {key.rpartition(".")[0] for key in kinds if "scale" in key.rpartition(".")[2]}
        for key, kind in kinds.items():
            if key.endswith(".SCB") and not (kind in _FLOATS and kinds.get(f"{key[:-3]}weight") == "I8"):
                raise self._not_quantized(f"{key[:-3]}weight")  # transformers would round it to int8
            if _is_float(key, kind):
                continue
            owners, dequantized = _owners(modules, key), dense and key.rpartition(".")[0] in scaled
            if key.endswith(".bias") or not any(_is_packed(m) or (dequantized and _is_matrix(m)) for m in owners):
                raise self._not_floats(key, kind, "its module is not one that the quantization converts")
        for name, module in modules.items() if quantizer and quantizer.pre_quantized else ():
            if type(module).__module__.startswith("bitsandbytes.") and not _has_scales(module, quantizer):
                raise self._not_quantized(f"{name}.weight")

    def _not_quantized(self, key: str) -> InputError:
        return InputError(
            f"The weight {key!r} of {self.source!r} is not of the type of its quantization, or lacks its scales: save "
            "the model again, or correct the quantization_config in its config.json."
        )

    def _not_floats(self, key: str, kind: str, why: str) -> InputError:
        return InputError(
            f"The weight {key!r} of {self.source!r} is of type {kind}, and {why}; expected {', '.join(_FLOATS)}. Save "
            "the model again in such a type."
        )

    def _safetensors(self, name: object, by: str) -> str:
        if isinstance(name, str) and name.endswith((".safetensors", ".safetensors.index.json")):
            return name
        raise UnsupportedModelError(
            f"{by} of {self.source!r} has its weights in {name!r}; others than safetensors are {_PICKLES} revision "
            "that has safetensors."
        )

    def _shard(self, name: object, index: str) -> Path:
        path = self.find(self._safetensors(name, index))
        if path is None:
            raise InputError(f"{index} of {self.source!r} names {name!r}, which is not there: download it again.")
        return path

    def _weight_map(self, file: Path) -> dict[str, str]:
        content = read_json_file(file)
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not isinstance(content.get("metadata"), dict):
            raise InputError(f"{file} is damaged: expected a weight_map and metadata. Download it again.")
        return {key: self._safetensors(name, file.name) for key, name in weight_map.items()}

    def _absent(self, names: tuple[str, ...]) -> Exception:
        kinds = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5")
        other = sorted(p.name for kind in kinds for p in (self.folder.glob(kind) if self.folder else ()))
        if other:
            return UnsupportedModelError(
                f"{self.source!r} has its weights in {', '.join(other[:3])}, which are {_PICKLES} revision that has "
                "safetensors."
            )
        where = "in the folder" if self.folder else "on the hub"
        return InputError(f"{self.source!r} has no weights: no {' or '.join(names)} file {where}.")


def quantization_of(source: str, config: Mapping[str, Any]) -> object:
    """The quantization of a config.json, at its top or in its text_config; raise for others, which are ignored."""
    found = dict(_quantizations(config))
    used = found.get((), found.get(("text_config",)))
    for path, settings in found.items():
        check_quantization(source, settings)
        if settings != used:
            raise UnsupportedModelError(
                f"config.json of {source!r} has a quantization_config in {'.'.join(path)}, which transformers ignores: "
                "it reads that at the top, or in text_config. Load the unquantized checkpoint."
            )
    return used


def _quantizations(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    if config.get("quantization_config") is not None:
        yield path, config["quantization_config"]
    for name, part in config.items():
        if name != "quantization_config" and isinstance(part, dict):
            yield from _quantizations(part, (*path, name))


def check_quantization(source: str, settings: object) -> None:
    """Raise for settings of a method that transformers does not have, which it would ignore."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as METHODS

    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", settings)
    name = str(getattr(method, "value", method))
    read = settings.get if isinstance(settings, dict) else partial(getattr, settings)
    flags = [read(flag, None) for flag in ("load_in_8bit", "load_in_4bit")]
    if name.startswith("bitsandbytes") and not any(flags):
        raise UnsupportedModelError(
            f"The quantization of {source!r} is of bitsandbytes, and neither load_in_8bit nor load_in_4bit is true, so "
            "that transformers ignores it. Set the one with which the weights were quantized."
        )
    if name not in METHODS and not (any(flags) and name in ("None", "bitsandbytes")):
        raise UnsupportedModelError(
            f"The quantization of {source!r} has the method {name!r}, which transformers does not have: "
            f"{nearest(name, METHODS)} Load the unquantized checkpoint, or install a version with it."
        )


def read_json_file(file: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint; an `InputError` if it is damaged, nested too deeply, or not a dictionary."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is damaged: expected a dictionary, got {type(content).__name__}. Download it again.")
    return content


def _is_float(key: str, kind: str) -> bool:
    return kind in _FLOATS or key.endswith("position_ids")


def _owners(modules: Mapping[str, Any], key: str) -> list[Any]:
    """The modules of a weight, also under an older name: those whose name ends in the longest part of its name."""
    parts = key.split(".")[:-1]
    for length in range(len(parts), 0, -1):
        for start in range(len(parts) - length + 1):
            part = ".".join(parts[start : start + length])
            if owners := [module for name, module in modules.items() if f".{name}".endswith(f".{part}")]:
                return owners
    return []


def _has_scales(module: Any, quantizer: Any) -> bool:
    """Whether a weight of bitsandbytes is in its type and has its scales, whose absence transformers ignores."""
    weight = module.weight
    if getattr(weight, "SCB", None) is not None:
        return weight.dtype == torch.int8
    storage = getattr(quantizer.quantization_config, "bnb_4bit_quant_storage", torch.uint8)
    return weight.is_meta or (getattr(weight, "quant_state", None) is not None and weight.dtype == storage)


def _is_packed(module: nn.Module) -> bool:
    """Whether a quantizer made the module, its weights, or a scheme for it."""
    library = type(module).__module__
    own = library.startswith(("torch.nn.", "transformers.")) and not library.startswith("transformers.integrations.")
    subclasses = (type(p.data) is not torch.Tensor for p in module.parameters(recurse=False))
    return not own or hasattr(module, "quantization_scheme") or any(subclasses)


def _is_matrix(module: nn.Module) -> bool:
    """Whether a quantizer could have converted the module: a linear one, or experts."""
    weights = [p for p in module.parameters(recurse=False) if p.ndim > 1]
    return bool(weights) and not isinstance(module, (nn.Embedding, nn.Conv2d, nn.Conv3d))


def _types(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"The weights in {file} are damaged: {error}. Download them again.") from error
