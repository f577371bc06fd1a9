"""ActivationCache: the activations of one run by name, patterns computed when they are read."""

import copy
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_mllm.cache.files import PathInput, load_fields, save_fields
from hooked_mllm.cache.kept_positions import KeptPositions, matched
from hooked_mllm.cache.keys import Key, full_name, key_completions, missing
from hooked_mllm.cache.lazy import (
    Entry,
    LazyPattern,
    LazyRows,
    Mapped,
    moved,
    parts_of,
    samples_of,
    take,
    take_columns,
    value_of,
)
from hooked_mllm.cache.logit_tools import LogitTools
from hooked_mllm.cache.sequence import Span, each_row
from hooked_mllm.cache.slicing import restacked, vision_slice
from hooked_mllm.checks import as_device, checked
from hooked_mllm.contracts import Model
from hooked_mllm.display.blocks import html_block, html_table
from hooked_mllm.display.text import human_bytes, number_runs, text_table
from hooked_mllm.errors import HookNameError, HookValueError
from hooked_mllm.families.base import Rows
from hooked_mllm.heads import heads_in_layer
from hooked_mllm.heads.parsing import LayerHeadsLike
from hooked_mllm.hooks.table import split_name
from hooked_mllm.inputs.positions import KindMasks, Positions

#: prefixes of activations whose first axis is not the batch
_OUTSIDE_TEXT = ("vision.", "projector.")


@checked
class ActivationCache(KeptPositions, LogitTools, Mapping[str, Tensor]):
    """The activations of one run.

    Read them by hook name or in short: `cache["blocks.3.attn.hook_z"]`, `cache["z", 3]`, `cache["pattern", -1]`,
    `cache["scale", 3, "ln1"]`, `cache["vision", "z", 2]`, `cache["projector", "out"]`, `cache["embed"]`,
    `cache["logits"]`.

    Attention patterns and scores are recomputed in float32 when they are read; until then the cache holds q and k,
    whose size grows with the number of tokens and not with its square. `cache.pattern(3, queries=..., keys=...)`
    computes just those rows and columns.

    Args:
        entries: Activations by hook name.
        n_layers: Blocks by tower.
        masks: Returns the mask of a token kind, `[batch pos]`.
        model: The model that ran, for the residual-stream tools.
        has_batch_dim: Whether the first axis is the batch.
        query_positions: Positions of the rows of patterns, if a run kept only some; -1 where a sample has fewer, and
            then the row is NaN, as are activations under `pos_slice`.
        key_positions: Likewise of the columns.
        vision_rows: Rows of vision activations that belong to each sample, or a function that returns them.
        packed_vision: Whether those rows are positions of one packed sequence, or tiles and frames.
        span: Positions of the sequence that the run computed; None for all.
        kept_positions: Positions of activations of the language model, if a run kept only some.

    Examples:
        >>> from hooked_mllm import HookedMLLM, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> logits, cache = model.run_with_cache(sample)
        >>> cache["pattern", 0].shape == (1, model.cfg.n_heads, len(sample), len(sample))
        True
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        n_layers: Mapping[str, int],
        masks: KindMasks | None = None,
        model: Model | None = None,
        has_batch_dim: bool = True,
        query_positions: Int[Tensor, "batch query"] | None = None,
        key_positions: Int[Tensor, "batch key"] | None = None,
        vision_rows: Sequence[Rows] | Callable[[], Sequence[Rows] | None] | None = None,
        packed_vision: bool = False,
        span: Span | None = None,
        kept_positions: Int[Tensor, "batch kept"] | None = None,
    ) -> None:
        self._entries = entries
        self._n_layers = dict(n_layers)
        self._masks = masks
        self.model = model
        self.has_batch_dim = has_batch_dim
        self.query_positions, self.key_positions = query_positions, key_positions
        self._vision_rows, self.packed_vision = vision_rows, packed_vision
        self.span, self.kept_positions = span, kept_positions

    def __copy__(self) -> "ActivationCache":
        other = object.__new__(type(self))
        other.__dict__ |= vars(self)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> "ActivationCache":
        lazy = (entry for entry in self._entries.values() if not isinstance(entry, Tensor))
        modules = [part for entry in lazy for part in vars(entry).values() if isinstance(part, nn.Module)]
        memo |= {id(part): part for part in (self.model, *modules)}  # the model is shared
        memo[id(self)] = other = copy.copy(self)
        other.__dict__ = copy.deepcopy(vars(self), memo)
        return other

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise HookValueError(
            f"A cache is not pickled: write it with `cache.save(path)`, and read it with {type(self).__name__}.load("
            "path, model), or GenerationCache.load for the cache of a generation."
        )

    @property
    def vision_rows(self) -> Sequence[Rows] | None:
        """Rows of vision activations that belong to each sample; None where the inputs do not determine them."""
        if callable(self._vision_rows):
            self._vision_rows = self._vision_rows()
        return self._vision_rows

    # -- reading ---------------------------------------------------------------------------------------------------

    def name_of(self, key: object) -> str:
        """The hook name of a key, whether or not the cache holds it."""
        if isinstance(key, str) and key in self._entries:
            return key
        return full_name(key, self._n_layers)

    def entry(self, key: object) -> Entry:
        """The cached tensor of a key, or the inputs that it is computed from."""
        name = self.name_of(key)
        if name not in self._entries:
            raise missing(name, self._entries, key)
        return self._entries[name]

    def __getitem__(self, key: object) -> Tensor:
        return self._unbatched(value_of(self.entry(key)))

    def _unbatched(self, value: Tensor, dim: int = 0) -> Tensor:
        return value if self.has_batch_dim or value.shape[dim] != 1 else value.squeeze(dim)

    def __contains__(self, key: object) -> bool:
        try:
            return self.name_of(key) in self._entries
        except HookNameError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> KeysView[str]:
        """The hook names held, in the order of the forward pass."""
        return self._entries.keys()

    def values(self) -> ValuesView[Tensor]:
        """The activations; patterns are computed one by one as they are reached."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Tensor]:
        """Names and activations; patterns are computed one by one as they are reached."""
        return ItemsView(self)

    @property
    def nbytes(self) -> int:
        """Bytes held, each storage counted once."""
        return held_bytes(self._entries.values())

    # -- display ---------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        lines = text_table([("", *line) for line in self._overview()]) if self._entries else ""
        return f"{self._title()}\n{lines}".rstrip()

    def _repr_html_(self) -> str:
        return html_block(self._title(), self._html_table())

    def _html_table(self) -> str:
        header = ("activation", "blocks", "shape", "dtype", "held")
        return html_table(self._overview(), header, align="<<<<>", named=True)

    def _title(self) -> str:
        return f"{type(self).__name__}: {len(self)} activations, {human_bytes(self.nbytes)}"

    def _overview(self) -> list[tuple[str, str, str, str, str]]:
        """Name, blocks, shape, dtype and bytes of each kind of activation."""
        layers: dict[tuple[str, str, str], list[int]] = {}
        held: dict[tuple[str, str, str], int] = {}
        for name, entry in self._entries.items():
            layer = split_name(name)[1]
            label = name if layer is None else name.replace(f"blocks.{layer}.", "blocks.*.", 1)
            dtype = (
                "float32, when read"
                if isinstance(entry, LazyPattern | LazyRows)
                else str(entry.dtype).removeprefix("torch.")
            )
            kind = (label, str(list(entry.shape)), dtype)
            layers.setdefault(kind, []).extend([] if layer is None else [layer])
            held[kind] = held.get(kind, 0) + sum(t.nbytes for t in parts_of(entry))
        return [
            (kind[0], f"blocks {number_runs(blocks)}" if blocks else "", kind[1], kind[2], human_bytes(held[kind]))
            for kind, blocks in layers.items()
        ]

    def _ipython_key_completions_(self) -> list[Key]:
        return key_completions(self._entries)

    # -- patterns --------------------------------------------------------------------------------------------------

    def pattern(
        self,
        layer: int,
        queries: Positions | None = None,
        keys: Positions | None = None,
        heads: LayerHeadsLike | None = None,
        tower: str = "text",
        scores: bool = False,
    ) -> Float[Tensor, "*batch head query key"]:
        """Some rows, columns and heads of one layer's attention pattern, in float32.

        In a batch of unequal samples, rows that a sample lacks are NaN, and columns that it lacks are those of a hidden
        key: zero, so that sums over keys hold, or -inf in scores. `sample.mask` specifies which.

        Args:
            layer: The block.
            queries: Rows: a token kind ("question", "last", "visual", ...), a region, a mask, indices, or a slice.
            keys: Columns, in the same forms; the softmax is over all keys in any case.
            heads: Heads of this layer: numbers (negative ones count from the end), a mask `[head]`, or names such as
                "L2H4"; of a `HeadSet` or a mask `[layer head]`, the heads in this layer.
            tower: "text" or "vision".
            scores: Return masked scores before the softmax instead.

        Raises:
            HookNameError: When the run kept no pattern of that layer.
            HeadError: For heads that the layer lacks, or heads of another layer.
            LayoutError: For a token kind without a layout, or positions that are not there.
        """
        name = "attn_scores" if scores else "pattern"
        key = (name, layer) if tower == "text" else (tower, name, layer)
        entry = self.entry(key)
        shape = (self._n_layers[tower], entry.shape[1])
        numbers = None if heads is None else heads_in_layer(heads, layer % shape[0], shape, whose=f"the {tower} tower")
        rows = None if queries is None else self._query_rows(queries, entry, tower)
        columns = None if keys is None else self._key_positions(keys, entry, tower)
        if isinstance(entry, LazyPattern | LazyRows):
            return self._unbatched(entry.rows(rows, columns, numbers))
        value = value_of(entry)
        if columns is not None and tower == "text" and self.key_positions is not None:
            columns = matched(columns, self.key_positions, keys)
        if columns is not None:  # a sliding window has dropped the first keys
            offset = 0 if self.span is None or tower != "text" else max(0, self.span.stop - value.shape[3])
            offset = 0 if self.key_positions is not None else offset
            value = take_columns(value, columns, offset, float("-inf") if scores else 0.0)
        value = value if rows is None else take(value, rows.to(value.device), dim=2, absent=torch.nan)
        return self._unbatched(value if numbers is None else value[:, numbers])

    # -- moving and slicing ----------------------------------------------------------------------------------------

    def _fields(self) -> dict[str, Any]:
        """The arguments of the constructor, without the model."""
        return {
            "entries": self._entries,
            "n_layers": self._n_layers,
            "masks": self._masks,
            "has_batch_dim": self.has_batch_dim,
            "query_positions": self.query_positions,
            "key_positions": self.key_positions,
            "vision_rows": self._vision_rows,
            "packed_vision": self.packed_vision,
            "span": self.span,
            "kept_positions": self.kept_positions,
        }

    def _indices(self) -> list[tuple[str, Tensor | None]]:
        return [(name, getattr(self, name)) for name in ("query_positions", "key_positions", "kept_positions")]

    def _like(self, **changes: Any) -> "ActivationCache":
        return ActivationCache(**{**self._fields(), "model": self.model, **changes})

    def _text_batch(self) -> int:
        """The number of samples in activations of the language model; 0 if there are none."""
        return max((e.shape[0] for name, e in self._entries.items() if not name.startswith(_OUTSIDE_TEXT)), default=0)

    def to(self, device: torch.device | str) -> "ActivationCache":
        """The same cache with its tensors on another device; patterns are then computed there."""
        return self._moved(as_device(device), {})

    def _moved(self, device: torch.device | str, known: Mapped) -> "ActivationCache":
        return self._like(entries={name: moved(entry, device, known) for name, entry in self._entries.items()})

    def sample(self, index: int | slice) -> "ActivationCache":
        """The activations of one sample of a batch, or of some; the batch axis stays.

        Activations of the vision tower and the projector are cut to the images of these samples; they are left out
        where the inputs do not assign images to samples, and for samples without an image.

        Raises:
            HookValueError: When there is no batch axis, or no such sample.
        """
        if not self.has_batch_dim:
            raise HookValueError("This cache has no batch axis any more: slice it before `remove_batch_dim`.")
        return self._sample(index, {})

    def _sample(self, index: int | slice, known: Mapped) -> "ActivationCache":
        batch = self._text_batch()
        choice = index if isinstance(index, slice) else slice(index, index + 1 if index != -1 else None)
        numbers = list(range(batch)[choice])
        if not numbers:
            raise HookValueError(f"No sample {index} in a batch of {batch}.")
        entries: dict[str, Entry] = {}
        for name, entry in self._entries.items():
            if not name.startswith(_OUTSIDE_TEXT):
                entries[name] = samples_of(entry, choice, known)
            elif self.vision_rows is not None:
                part = vision_slice(entry, self.vision_rows, numbers, self.packed_vision)
                entries |= {} if part is None else {name: part}
        masks = self._masks
        return self._like(
            entries=entries,
            masks=None if masks is None else lambda kind: each_row(masks(kind), batch)[choice],
            **{name: None if index is None else each_row(index, batch)[choice] for name, index in self._indices()},
            vision_rows=None if self.vision_rows is None else restacked(self.vision_rows, numbers),
        )

    def apply_slice_to_batch_dim(self, batch_slice: int | slice | tuple[int, int]) -> "ActivationCache":
        """TransformerLens's form of `sample`: a number also removes the batch axis, and two in a tuple are a range."""
        if isinstance(batch_slice, int):
            return self.sample(batch_slice).remove_batch_dim()
        return self.sample(slice(*batch_slice) if isinstance(batch_slice, tuple) else batch_slice)

    def remove_batch_dim(self) -> "ActivationCache":
        """Read this cache of one sample without its batch axis, also by `pattern` and the stream's tools.

        In place, as in TransformerLens; returns the cache itself.

        Raises:
            HookValueError: For a batch of several samples.
        """
        if self.has_batch_dim and self._text_batch() > 1:
            raise HookValueError("remove_batch_dim needs a batch of one; use `cache.sample(i)` first.")
        self.has_batch_dim = False
        return self

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: PathInput) -> None:
        """Write the cache to a safetensors file; what patterns are computed from is written, not the patterns.

        Raises:
            CacheFileError: If the file cannot be written.
        """
        save_fields([self._fields() | {"vision_rows": self.vision_rows}], path)

    @classmethod
    def load(cls, path: PathInput, model: Model | None = None) -> "ActivationCache":
        """Read a cache that `save` wrote.

        Args:
            path: The file.
            model: The model that ran, for the residual-stream tools.

        Raises:
            CacheFileError: If the file is missing, damaged, altered, a pickle, or holds something else.
        """
        return cls(**load_fields(path)[0], model=model)


def held_bytes(entries: Iterable[Entry]) -> int:
    """Bytes of the tensors of entries, each storage counted once."""
    storages = [tensor.untyped_storage() for entry in entries for tensor in parts_of(entry)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
