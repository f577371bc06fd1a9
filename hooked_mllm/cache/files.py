"""Caches as safetensors files: tensors and a JSON header, never a pickle.

What a cache computes when it is read is written as what it is computed from: q, k and the mask of a pattern, z and W_O
of head results; and what several entries share, such as the keys of all steps of a generation, once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.streaming import StreamingHeads
from hooked_mllm.cache.lazy import Entry, GrowingKeys, LazyKeys, LazyPattern, LazyResult, value_of
from hooked_mllm.errors import CacheFileError, HookedMLLMError, LayoutError

FORMAT = "hooked_mllm.ActivationCache/2"
#: formats that are read; the first had neither streaming heads nor offsets
READABLE = ("hooked_mllm.ActivationCache/1", FORMAT)
KINDS = ("question", "answer", "system", "template", "visual", "text", "padding", "last", "target")


class _Writer:
    """Gathers tensors under names, each storage view once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[tuple[Any, ...], tuple[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor | None) -> str | None:
        if tensor is None:
            return None
        tensor = tensor.detach()
        view = (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if view not in self._known or tensor.numel() == 0:
            self._known[view] = name, tensor  # kept alive, so that its address stays its own
            self.tensors[name] = tensor.cpu().contiguous().clone()
        return self._known[view][0]

    def keys(self, name: str, k: Tensor | GrowingKeys) -> str | None:
        return self.add(name, k.upto(k.length) if isinstance(k, GrowingKeys) else k)

    def entry(self, name: str, entry: Entry) -> dict[str, Any]:
        if isinstance(entry, LazyPattern):
            return self._pattern(name, entry)
        if isinstance(entry, LazyResult):
            weight = self.add(f"{name}/W_O", entry.o_proj.weight)  # type: ignore[arg-type]
            return {"kind": "result", "z": self.add(f"{name}/z", entry.z), "W_O": weight}
        if isinstance(entry, LazyKeys):
            return {"kind": "keys", "k": self.keys(f"{name}/k", entry.keys), "length": entry.length}
        return {"kind": "tensor", "tensor": self.add(name, value_of(entry))}

    def _pattern(self, name: str, entry: LazyPattern) -> dict[str, Any]:
        mask = entry.mask.compact()
        tensors = {"index": entry.index, "columns": entry.columns, "dense": mask.dense, "padding": mask.padding}
        return {
            "kind": "pattern",
            "q": self.add(f"{name}/q", entry.q),
            "k": self.keys(f"{name}/k", entry.k),
            "growing": isinstance(entry.k, GrowingKeys),
            "scale": float(entry.scale),
            "scores": entry.scores,
            "batch": mask.batch,
            "q_length": mask.q_length,
            "kv_length": mask.kv_length,
            "causal": mask.causal,
            "window": mask.window,
            "segments": mask.segments,
            "q_offset": mask.q_offset,
            "streaming": None if mask.streaming is None else asdict(mask.streaming),
            **{key: self.add(f"{name}/{key}", tensor) for key, tensor in tensors.items()},
        }

    def cache(self, cache: Any, prefix: str) -> dict[str, Any]:
        masks = None if cache._masks is None else known_masks(cache._masks)
        return {
            "entries": {name: self.entry(prefix + name, entry) for name, entry in cache._entries.items()},
            "n_layers": cache._n_layers,
            "has_batch_dim": cache.has_batch_dim,
            "vision_rows": cache.vision_rows,
            "packed_vision": cache.packed_vision,
            "query_positions": self.add(f"{prefix}/query_positions", cache.query_positions),
            "key_positions": self.add(f"{prefix}/key_positions", cache.key_positions),
            "masks": None if masks is None else {k: self.add(f"{prefix}/mask/{k}", m) for k, m in masks.items()},
        }


def save(caches: Sequence[Any], path: str | Path, *, generation: bool = False) -> None:
    """Write a cache, or the caches of a generation's steps, to `path`, by way of a temporary name."""
    path = Path(path)
    writer = _Writer()
    steps = [writer.cache(cache, f"{number}:" if generation else "") for number, cache in enumerate(caches)]
    header = {"format": FORMAT, "generation": generation, "steps": steps}
    temporary = path.with_name(path.name + ".partial")
    try:
        save_file(writer.tensors, str(temporary), metadata={"hooked_mllm": json.dumps(header)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def known_masks(masks: Any) -> Mapping[str, Tensor]:
    """The token kinds that a layout can name, as masks."""
    found = {}
    for kind in KINDS:
        try:
            found[kind] = masks(kind)
        except HookedMLLMError:  # a kind that this sample does not have: nothing to write
            continue
    return found


def load(path: str | Path, model: Any = None, *, generation: bool = False) -> list[Any]:
    """Read from `path` a cache, or the caches of a generation's steps.

    Raises:
        CacheFileError: for a file that is missing, corrupt, pickled, or something else.
    """
    path = Path(path)
    header, tensors = _read(path)
    if header["generation"] is not generation:
        kinds = ("ActivationCache", "GenerationCache")
        raise CacheFileError(
            f"{path} was written by a {kinds[not generation]}: read it with {kinds[not generation]}.load."
        )
    growing: dict[str, GrowingKeys] = {}
    try:
        return [_cache(step, tensors, growing, model) for step in header["steps"]]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise CacheFileError(f"The header of {path} does not fit what it holds ({error!r}): it is damaged.") from error


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CacheFileError(f"No cache file at {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        with path.open("rb") as raw:
            start = raw.read(2)
        # a pickle of protocol 2 and up starts with \x80 and its number, a file of torch.save is a zip archive
        pickled = start == b"PK" or (len(start) == 2 and start[0] == 0x80 and start[1] < 16)
        kind = "a pickle or torch.save file, which is never read" if pickled else "damaged"
        raise CacheFileError(
            f"{path} is not a readable safetensors file ({error}); it is {kind}. Expected what `cache.save` writes."
        ) from error
    try:
        header = json.loads(metadata["hooked_mllm"])
        found, _, _ = header["format"], header["generation"], header["steps"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CacheFileError(
            f"{path} is a safetensors file, but not one that `cache.save` wrote ({error!r})."
        ) from error
    if found not in READABLE:
        raise CacheFileError(f"{path} holds {found!r}; expected {' or '.join(map(repr, READABLE))}.")
    return header, tensors


def _cache(header: dict[str, Any], tensors: dict[str, Tensor], growing: dict[str, GrowingKeys], model: Any) -> Any:
    from hooked_mllm.cache.activation_cache import ActivationCache

    named = header["masks"]

    def masks(kind: str) -> Tensor:
        if kind not in named:
            raise LayoutError(f"The file keeps no positions of kind {kind!r}; it has {', '.join(named)}.")
        return tensors[named[kind]]

    entries = {name: _entry(name, spec, tensors, growing) for name, spec in header["entries"].items()}
    places = {k: None if header[k] is None else tensors[header[k]] for k in ("query_positions", "key_positions")}
    rows = header["vision_rows"]
    return ActivationCache(
        entries,
        header["n_layers"],
        None if named is None else masks,
        model,
        header["has_batch_dim"],
        **places,
        vision_rows=None if rows is None else [[(start, stop) for start, stop in spans] for spans in rows],
        packed_vision=header["packed_vision"],
    )


def _entry(name: str, spec: dict[str, Any], tensors: dict[str, Tensor], growing: dict[str, GrowingKeys]) -> Entry:
    def keys(k: str) -> GrowingKeys:
        if k not in growing:
            growing[k] = GrowingKeys()
            growing[k].append(tensors[k])
        return growing[k]

    if spec["kind"] == "tensor":
        return tensors[spec["tensor"]]
    if spec["kind"] == "keys":
        return LazyKeys(keys(spec["k"]), spec["length"])
    if spec["kind"] == "result":
        weight = tensors[spec["W_O"]]
        o_proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        o_proj.weight = nn.Parameter(weight, requires_grad=False)
        return LazyResult(tensors[spec["z"]], o_proj)
    get = {k: None if spec[k] is None else tensors[spec[k]] for k in ("index", "columns", "dense", "padding")}
    streaming = spec.get("streaming")
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
        q_offset=spec.get("q_offset"),
        streaming=None if streaming is None else StreamingHeads(**{**streaming, "dense": tuple(streaming["dense"])}),
    )
    k = keys(spec["k"]) if spec["growing"] else tensors[spec["k"]]
    return LazyPattern(tensors[spec["q"]], k, mask, spec["scale"], name, spec["scores"], get["index"], get["columns"])
