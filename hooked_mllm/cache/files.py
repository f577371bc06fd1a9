"""Caches as safetensors files: tensors and a JSON header, never a pickle; tensors that entries share are written once.

Patterns are written as q, k and mask, head results as z and W_O.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.streaming import StreamingHeads
from hooked_mllm.cache.lazy import Entry, GrowingKeys, LazyKeys, LazyPattern, LazyResult, LazyRows
from hooked_mllm.cache.sequence import Span
from hooked_mllm.errors import CacheFileError, HookedMLLMError, LayoutError
from hooked_mllm.inputs.positions import KindMasks, TokenKind
from hooked_mllm.storage import read_tensors, ready, restoring, write_tensors
from hooked_mllm.wiring.results import effective_weight, is_plain

if TYPE_CHECKING:
    PathInput = str | PathLike[str]
else:  # at run time anything, so that another value reaches the error of `storage.ready`
    PathInput = object

FORMAT = "hooked_mllm.ActivationCache/2"
#: formats that are read; the first had neither streaming heads nor offsets
READABLE = ("hooked_mllm.ActivationCache/1", FORMAT)
TOKEN_KINDS = ("question", "answer", "system", "template", "visual", "text", "padding", "last", "target")
#: tensors of positions among the fields of a cache
_POSITIONS = ("query_positions", "key_positions", "kept_positions")
#: fields of a mask that JSON holds as they are
_MASK_FIELDS = ("batch", "q_length", "kv_length", "causal", "window", "segments", "q_offset")
#: the arguments of the constructor of an `ActivationCache`, without the model
Fields: TypeAlias = dict[str, Any]


class _Writer:
    """Gathers tensors under names, each storage view once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
        self._masks: dict[int, dict[str, str | None]] = {}

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
        if isinstance(entry, LazyResult):
            weight = weight_of_result(entry)
            if weight is None:
                return {"kind": "tensor", "tensor": self.add(name, entry.tensor())}
            return {"kind": "result", "z": self.add(f"{name}/z", entry.z), "W_O": self.add(f"{name}/W_O", weight)}
        if isinstance(entry, LazyKeys):
            return {"kind": "keys", "k": self.keys(f"{name}/k", entry.keys), "length": entry.length}
        if isinstance(entry, LazyRows):
            calls = [self.entry(f"{name}/{number}", call) for number, call in enumerate(entry.calls)]
            tensors = {
                "index": self.add(f"{name}/index", entry.index),
                "columns": self.add(f"{name}/columns", entry.columns),
            }
            return {"kind": "rows", "calls": calls, "length": entry.length, **tensors}
        if not isinstance(entry, LazyPattern):
            return {"kind": "tensor", "tensor": self.add(name, entry)}
        mask = entry.mask.compact()
        tensors = {"index": entry.index, "columns": entry.columns, "dense": mask.dense, "padding": mask.padding}
        return {
            "kind": "pattern",
            "q": self.add(f"{name}/q", entry.q),
            "k": self.keys(f"{name}/k", entry.k),
            "growing": isinstance(entry.k, GrowingKeys),
            "scale": float(entry.scale),
            "scores": entry.scores,
            "key_offset": entry.key_offset,
            "even": entry.even,
            **{name: getattr(mask, name) for name in _MASK_FIELDS},
            "streaming": None if mask.streaming is None else asdict(mask.streaming),
            **{key: self.add(f"{name}/{key}", tensor) for key, tensor in tensors.items()},
        }

    def cache(self, fields: Fields, prefix: str) -> dict[str, Any]:
        return {
            **fields,
            "span": None if fields["span"] is None else asdict(fields["span"]),
            "entries": {name: self.entry(prefix + name, entry) for name, entry in fields["entries"].items()},
            **{k: self.add(f"{prefix}/{k}", fields[k]) for k in _POSITIONS},
            "masks": None if fields["masks"] is None else self.masks(fields["masks"], prefix),
        }

    def masks(self, masks: KindMasks, prefix: str) -> dict[str, str | None]:
        """Names of the masks; steps of a generation share those of the prompt."""
        if id(masks) not in self._masks:
            self._masks[id(masks)] = {k: self.add(f"{prefix}/mask/{k}", m) for k, m in known_masks(masks).items()}
        return self._masks[id(masks)]


def weight_of_result(entry: LazyResult) -> Tensor | None:
    """W_O, which a file keeps instead of results; None where these are not z W_O, as where z is quantised, too."""
    n_heads, d_head = entry.z.shape[2:]
    weight, end = effective_weight(entry.o_proj, n_heads * d_head, entry.z.dtype), replace(entry, z=entry.z[:, -1:])
    if is_plain(entry.o_proj):
        return weight
    results = end.tensor()
    by_head = weight.to(results).unflatten(1, (n_heads, d_head))  # [d_model head d_head]
    product = torch.einsum("bphd,mhd->bphm", end.z, by_head)
    tolerance = max(1e-5, torch.finfo(results.dtype).eps / 2)
    return weight if (product - results).float().norm() <= tolerance * results.float().norm() else None


def save_fields(caches: Sequence[Fields], path: PathInput, *, generation: bool = False) -> None:
    """Write a cache, or the caches of a generation's steps, to `path`."""
    path = ready(path)
    writer = _Writer()
    steps = [writer.cache(cache, f"{number}:" if generation else "") for number, cache in enumerate(caches)]
    write_tensors(path, FORMAT, writer.tensors, {"generation": generation, "steps": steps})


def known_masks(masks: KindMasks) -> Mapping[str, Tensor]:
    """The masks `[batch pos]` of the token kinds that these samples have."""
    known = {}
    for kind in TOKEN_KINDS:
        try:
            known[kind] = masks(kind)
        except HookedMLLMError:  # a kind that this sample does not have: nothing to write
            continue
    return known


def load_fields(path: PathInput, *, generation: bool = False) -> list[Fields]:
    """Read from `path` what was saved of a cache, or of the caches of a generation's steps."""
    tensors, header = read_tensors(path, *READABLE)
    growing: dict[str, GrowingKeys] = {}
    with restoring(path):
        if header["generation"] is not generation:
            saved = "ActivationCache" if generation else "GenerationCache"
            raise CacheFileError(f"{path} was written by a {saved}: read it with {saved}.load.")
        if not header["steps"]:
            raise CacheFileError(f"{path} is damaged: it holds no cache.")
        return [_fields(step, tensors, growing) for step in header["steps"]]


def _fields(header: dict[str, Any], tensors: dict[str, Tensor], growing: dict[str, GrowingKeys]) -> Fields:
    mask_names, rows = header["masks"], header["vision_rows"]

    def masks(kind: TokenKind) -> Tensor:
        if not isinstance(kind, str) or kind not in mask_names:
            raise LayoutError(f"The file keeps no positions of kind {kind!r}; it has {', '.join(mask_names)}.")
        return tensors[mask_names[kind]]

    positions = {k: header.get(k) for k in _POSITIONS}
    span = header.get("span")  # files of earlier versions have none
    return {
        "entries": {name: _entry(name, spec, tensors, growing) for name, spec in header["entries"].items()},
        "n_layers": dict(header["n_layers"]),
        "masks": None if mask_names is None else masks,
        **{k: None if name is None else tensors[name] for k, name in positions.items()},
        "vision_rows": None if rows is None else [[(start, stop) for start, stop in spans] for spans in rows],
        **{k: header[k] for k in ("has_batch_dim", "packed_vision")},
        "span": None if span is None else Span(**span),
    }


def _entry(name: str, spec: dict[str, Any], tensors: dict[str, Tensor], growing: dict[str, GrowingKeys]) -> Entry:
    def keys(k: str) -> GrowingKeys:
        if k not in growing:
            growing[k] = GrowingKeys()
            growing[k].chunks.append(tensors[k])
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
    if spec["kind"] == "rows":
        calls = [_entry(name, call, tensors, growing) for call in spec["calls"]]
        assert index is not None
        return LazyRows([call for call in calls if isinstance(call, LazyPattern)], index, spec["length"], columns)
    k = keys(spec["k"]) if spec["growing"] else tensors[spec["k"]]
    q, mask, more = tensors[spec["q"]], _mask(spec, tensors), (spec.get("key_offset", 0), spec.get("even"))
    return LazyPattern(q, k, mask, spec["scale"], name, spec["scores"], index, columns, *more)


def _mask(spec: dict[str, Any], tensors: dict[str, Tensor]) -> MaskRows:
    dense, padding = (None if spec[k] is None else tensors[spec[k]] for k in ("dense", "padding"))
    numbers: dict[str, Any] = {name: spec.get(name) for name in _MASK_FIELDS}
    window, q_offset, streaming = numbers["window"], numbers["q_offset"], spec.get("streaming")
    # files of earlier versions have no digest, which would show changed numbers
    if (window is not None and window < 1) or not 0 <= (q_offset or 0) <= spec["kv_length"]:
        raise ValueError(f"a mask over {spec['kv_length']} keys cannot have window={window}, q_offset={q_offset}")
    numbers["segments"] = None if spec["segments"] is None else tuple(spec["segments"])
    streaming = None if streaming is None else StreamingHeads(**{**streaming, "dense": tuple(streaming["dense"])})
    return MaskRows(**numbers, device=torch.device("cpu"), dense=dense, padding=padding, streaming=streaming)
