"""What the files of a checkpoint are, before they are loaded: safetensors, in its folder, of known types."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open
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

    def check_weights(self, config: Mapping[str, Any], variant: str | None, *, quantized: bool) -> None:
        """Raise for weights that are not safetensors, outside the folder, absent, in two files, or not numbers."""
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
        for shard in shards:
            for key, kind in _types(shard).items():
                if key in kept:
                    raise InputError(f"The weight {key!r} of {self.source!r} is in {kept[key].name} and {shard.name}.")
                kept[key] = shard
                if not (quantized or kind in _FLOATS or key.endswith("position_ids")):
                    raise InputError(
                        f"The weight {key!r} of {self.source!r} is of type {kind}, and its config.json has no "
                        f"quantization_config; expected {', '.join(_FLOATS)}. Save the model again in such a type."
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


def check_quantization(source: str, settings: object) -> None:
    """Raise for settings of a method that transformers does not have, which it would ignore."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as METHODS

    if isinstance(settings, dict) and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", settings)
    name = str(getattr(method, "value", method))
    if name not in METHODS and f"{name}_8bit" not in METHODS:
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


def _types(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"The weights in {file} are damaged: {error}. Download them again.") from error
