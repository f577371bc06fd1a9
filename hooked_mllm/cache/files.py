"""Caches as safetensors files: tensors and a JSON header, never a pickle.

What a cache computes when it is read is written as what it is computed from: q, k and the mask of a pattern, z and W_O
of head results; and what several entries share, such as the keys of all steps of a generation, once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.streaming import StreamingHeads
from hooked_mllm.cache.lazy import Entry, GrowingKeys, LazyKeys, LazyPattern, LazyResult, value_of
from hooked_mllm.errors import CacheFileError, HookedMLLMError, LayoutError
from hooked_mllm.families.base import Rows
from hooked_mllm.inputs.positions import KindMasks, TokenKind
from hooked_mllm.storage import read_tensors, ready, restoring, write_tensors

if TYPE_CHECKING:
    PathInput = str | PathLike[str]
else:  # at run time anything, so that another value reaches the error of `storage.ready`
    PathInput = object

FORMAT = "hooked_mllm.ActivationCache/2"
#: formats that are read; the first had neither streaming heads nor offsets
READABLE = ("hooked_mllm.ActivationCache/1", FORMAT)
TOKEN_KINDS = ("question", "answer", "system", "template", "visual", "text", "padding", "last", "target")


@dataclass(frozen=True)
class CacheFields:
    """What a file holds of one `ActivationCache`: the arguments of its constructor, without the model."""

    entries: dict[str, Entry]
    n_layers: Mapping[str, int]
    masks: KindMasks | None
    has_batch_dim: bool
    query_positions: Tensor | None
    key_positions: Tensor | None
    vision_rows: Sequence[Rows] | None
    packed_vision: bool


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
            self.tensors[name] = tensor
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

    def cache(self, cache: CacheFields, prefix: str) -> dict[str, Any]:
        masks = None if cache.masks is None else known_masks(cache.masks)
        return {
            "entries": {name: self.entry(prefix + name, entry) for name, entry in cache.entries.items()},
            "n_layers": dict(cache.n_layers),
            "has_batch_dim": cache.has_batch_dim,
            "vision_rows": cache.vision_rows,
            "packed_vision": cache.packed_vision,
            "query_positions": self.add(f"{prefix}/query_positions", cache.query_positions),
            "key_positions": self.add(f"{prefix}/key_positions", cache.key_positions),
            "masks": None if masks is None else {k: self.add(f"{prefix}/mask/{k}", m) for k, m in masks.items()},
        }


def save_fields(caches: Sequence[CacheFields], path: PathInput, *, generation: bool = False) -> None:
    """Write a cache, or the caches of a generation's steps, to `path`.

    Raises:
        CacheFileError: If the file cannot be written.
    """
    path = ready(path)
    writer = _Writer()
    steps = [writer.cache(cache, f"{number}:" if generation else "") for number, cache in enumerate(caches)]
    write_tensors(path, FORMAT, writer.tensors, {"generation": generation, "steps": steps})


def known_masks(masks: KindMasks) -> Mapping[str, Tensor]:
    """The token kinds that a layout can name, as masks."""
    known = {}
    for kind in TOKEN_KINDS:
        try:
            known[kind] = masks(kind)
        except HookedMLLMError:  # a kind that this sample does not have: nothing to write
            continue
    return known


def load_fields(path: PathInput, *, generation: bool = False) -> list[CacheFields]:
    """Read from `path` what was saved of a cache, or of the caches of a generation's steps.

    Raises:
        CacheFileError: If the file is missing, damaged, altered, a pickle, or holds something else.
    """
    tensors, header = read_tensors(path, *READABLE)
    growing: dict[str, GrowingKeys] = {}
    with restoring(path):
        if header["generation"] is not generation:
            saved = "ActivationCache" if generation else "GenerationCache"
            raise CacheFileError(f"{path} was written by a {saved}: read it with {saved}.load.")
        if not header["steps"]:
            raise CacheFileError(f"{path} is damaged: it holds no cache.")
        return [_fields(step, tensors, growing) for step in header["steps"]]


def _fields(header: dict[str, Any], tensors: dict[str, Tensor], growing: dict[str, GrowingKeys]) -> CacheFields:
    mask_names, rows = header["masks"], header["vision_rows"]

    def masks(kind: TokenKind) -> Tensor:
        if not isinstance(kind, str) or kind not in mask_names:
            raise LayoutError(f"The file keeps no positions of kind {kind!r}; it has {', '.join(mask_names)}.")
        return tensors[mask_names[kind]]

    return CacheFields(
        entries={name: _entry(name, spec, tensors, growing) for name, spec in header["entries"].items()},
        n_layers=dict(header["n_layers"]),
        masks=None if mask_names is None else masks,
        has_batch_dim=header["has_batch_dim"],
        query_positions=None if header["query_positions"] is None else tensors[header["query_positions"]],
        key_positions=None if header["key_positions"] is None else tensors[header["key_positions"]],
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
    index, columns = (None if spec[k] is None else tensors[spec[k]] for k in ("index", "columns"))
    k = keys(spec["k"]) if spec["growing"] else tensors[spec["k"]]
    return LazyPattern(tensors[spec["q"]], k, _mask(spec, tensors), spec["scale"], name, spec["scores"], index, columns)


def _mask(spec: dict[str, Any], tensors: dict[str, Tensor]) -> MaskRows:
    dense, padding = (None if spec[k] is None else tensors[spec[k]] for k in ("dense", "padding"))
    window, q_offset, streaming = spec["window"], spec.get("q_offset"), spec.get("streaming")
    # files of earlier versions have no digest, which would show changed numbers
    if (window is not None and window < 1) or not 0 <= (q_offset or 0) <= spec["kv_length"]:
        raise ValueError(f"a mask over {spec['kv_length']} keys cannot have window={window}, q_offset={q_offset}")
    return MaskRows(
        spec["batch"],
        spec["q_length"],
        spec["kv_length"],
        torch.device("cpu"),
        dense=dense,
        padding=padding,
        causal=spec["causal"],
        window=window,
        segments=None if spec["segments"] is None else tuple(spec["segments"]),
        q_offset=q_offset,
        streaming=None if streaming is None else StreamingHeads(**{**streaming, "dense": tuple(streaming["dense"])}),
    )
