"""Caches as safetensors files: tensors and a JSON header, never a pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.cache.lazy import Entry, LazyPattern, value_of
from hooked_mllm.errors import CacheFileError, HookedMLLMError, LayoutError

FORMAT = "hooked_mllm.ActivationCache/1"


class _Writer:
    """Gathers tensors under names, each storage view once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[tuple[Any, ...], str] = {}

    def add(self, name: str, tensor: Tensor) -> str:
        tensor = tensor.detach()
        view = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if view not in self._known:
            self._known[view] = name
            self.tensors[name] = tensor.cpu().contiguous().clone()
        return self._known[view]


def _pattern_header(writer: _Writer, name: str, entry: LazyPattern) -> dict[str, Any]:
    mask = entry.mask.compact()
    header: dict[str, Any] = {
        "kind": "pattern",
        "q": writer.add(f"{name}/q", entry.q),
        "k": writer.add(f"{name}/k", entry.keys()),
        "scale": float(entry.scale),
        "scores": entry.scores,
        "batch": mask.batch,
        "q_length": mask.q_length,
        "kv_length": mask.kv_length,
        "causal": mask.causal,
        "window": mask.window,
        "segments": mask.segments,
    }
    extra = {"index": entry.index, "columns": entry.columns, "dense": mask.dense, "padding": mask.padding}
    for key, tensor in extra.items():
        header[key] = None if tensor is None else writer.add(f"{name}/{key}", tensor)
    return header


def save(cache: Any, path: str | Path) -> None:
    """Write a cache to `path`, by way of a temporary name."""
    path = Path(path)
    writer = _Writer()
    entries = {
        name: _pattern_header(writer, name, entry)
        if isinstance(entry, LazyPattern)
        else {"kind": "tensor", "tensor": writer.add(name, value_of(entry))}
        for name, entry in cache._entries.items()
    }
    header = {
        "format": FORMAT,
        "entries": entries,
        "n_layers": cache._n_layers,
        "has_batch_dim": cache.has_batch_dim,
        "query_positions": None
        if cache.query_positions is None
        else writer.add("/query_positions", cache.query_positions),
        "key_positions": None if cache.key_positions is None else writer.add("/key_positions", cache.key_positions),
    }
    if cache._masks is not None:
        header["masks"] = {
            kind: writer.add(f"/mask/{kind}", mask) for kind, mask in known_masks(cache._masks).items()
        }
    temporary = path.with_name(path.name + ".partial")
    try:
        save_file(writer.tensors, str(temporary), metadata={"hooked_mllm": json.dumps(header)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def known_masks(masks: Any) -> Mapping[str, Tensor]:
    """The token kinds that a layout can name, as masks."""
    found = {}
    for kind in ("question", "answer", "system", "template", "visual", "text", "padding", "last", "target"):
        try:
            found[kind] = masks(kind)
        except HookedMLLMError:  # a kind that this sample does not have: nothing to write
            continue
    return found


def load(path: str | Path, model: Any = None) -> Any:
    """Read a cache from `path`.

    Raises:
        CacheFileError: for a file that is corrupt, pickled, or something else.
    """
    from hooked_mllm.cache.activation_cache import ActivationCache

    path = Path(path)
    if not path.is_file():
        raise CacheFileError(f"No cache file at {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        with path.open("rb") as raw:
            start = raw.read(2)
        kind = "a pickle or torch.save file, which is never read" if start in (b"\x80\x02", b"\x80\x04", b"PK") else "damaged"
        raise CacheFileError(
            f"{path} is not a readable safetensors file ({error}); it is {kind}. Expected what `cache.save` writes."
        ) from error
    try:
        header = json.loads(metadata["hooked_mllm"])
        if header["format"] != FORMAT:
            raise CacheFileError(f"{path} holds {header['format']!r}; expected {FORMAT!r}.")
        entries = {name: _entry(name, spec, tensors) for name, spec in header["entries"].items()}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CacheFileError(f"{path} is a safetensors file, but not one that `cache.save` wrote ({error!r}).") from error
    named = header.get("masks")

    def masks(kind: str) -> Tensor:
        if kind not in named:
            raise LayoutError(f"The file keeps no positions of kind {kind!r}; it has {', '.join(named)}.")
        return tensors[named[kind]]

    place = {k: None if header[k] is None else tensors[header[k]] for k in ("query_positions", "key_positions")}
    return ActivationCache(entries, header["n_layers"], None if named is None else masks, model, header["has_batch_dim"], **place)


def _entry(name: str, spec: dict[str, Any], tensors: dict[str, Tensor]) -> Entry:
    if spec["kind"] == "tensor":
        return tensors[spec["tensor"]]
    get = {k: None if spec[k] is None else tensors[spec[k]] for k in ("index", "columns", "dense", "padding")}
    mask = MaskRows(
        spec["batch"],
        spec["q_length"],
        spec["kv_length"],
        torch.device("cpu"),
        dense=get["dense"],
        padding=get["padding"],
        causal=spec["causal"],
        window=spec["window"],
        segments=None if spec["segments"] is None else tuple(spec["segments"]),
    )
    return LazyPattern(
        tensors[spec["q"]],
        tensors[spec["k"]],
        mask,
        spec["scale"],
        name,
        spec["scores"],
        get["index"],
        get["columns"],
    )
