"""Caching of activations during a forward pass or a generation: what is kept, and in which form."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from hooked_mllm.attention.site import AttentionCall, AttentionSite
from hooked_mllm.cache.lazy import (
    Entry,
    GrowingKeys,
    LazyKeys,
    LazyPattern,
    LazyResult,
    LazyRows,
    by_position,
    take,
    take_columns,
    value_of,
)
from hooked_mllm.cache.sequence import Span, each_row
from hooked_mllm.errors import HookValueError
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.table import is_quadratic
from hooked_mllm.wiring.model import Wiring
from hooked_mllm.wiring.results import state_of

#: positions of each sample, -1 where a sample has fewer than the others
Index: TypeAlias = Int[Tensor, "batch _"]


@dataclass
class CaptureOptions:
    """What a run caches, and in which form."""

    points: list[HookPoint]
    gradients: list[HookPoint]
    device: torch.device | str | None = None
    positions: Index | None = None  # of language-model activations
    queries: Index | None = None  # rows of patterns and scores
    keys: Index | None = None  # columns of patterns and scores
    growing: bool = False  # the keys of each step extend those of the step before (a plain generation)
    copy: bool = False  # activations may be edited in place after they are cached
    packed_vision: bool = False  # several calls of the vision tower are joined along positions
    first: int = 0  # position of the first row: above 0 behind a KV cache
    stop: int = 0  # position after the last row of the prompt
    known: int = 0  # position of the first token whose kind is known
    generates: bool = False  # every step is cached by itself
    last_logits: int = 0  # logits of this many last positions only; 0 for all


@dataclass
class Part:
    """What one call of the model stored of an activation, and the positions of its rows in the sequence."""

    entry: Entry
    first: int
    stop: int
    hidden: float  # the value at keys that are not visible


class Capture:
    """A context in which activations are cached, one dictionary of entries for each step of the run."""

    def __init__(self, wiring: Wiring, options: CaptureOptions) -> None:
        self.wiring, self.options = wiring, options
        self.steps: dict[int, dict[str, list[Part]]] = {}
        self.extents: dict[int, tuple[int, int]] = {}  # positions of the rows of each step
        self.gradients: dict[str, list[Tensor]] = {}
        self._stack = ExitStack()
        self._growing: dict[int, GrowingKeys] = {}

    # -- registering hooks ---------------------------------------------------------------------------------------------

    def __enter__(self) -> "Capture":
        names, context = {p.name for p in self.options.points}, self.wiring.registry.context
        with self._stack:  # an error removes what is attached already
            scope = self._stack.enter_context(context.scope(of_run=True))
            with context.registers_in(scope):
                for site in (*self.wiring.text, *self.wiring.vision):
                    names -= self._attach_attention(site, names)
                for point in self.options.points:
                    if point.name in names:
                        self._register(point, self._keep)
                for point in self.options.gradients:
                    self._stack.callback(point.remove, point.add_hook(self._keep_gradient, "bwd"))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _register(self, point: HookPoint, fn: Callable[..., None]) -> None:
        self._stack.callback(point.remove, point.add_hook(fn, reads_only=True))

    def _attach_attention(self, site: AttentionSite, names: set[str]) -> set[str]:
        """Cache patterns and scores as q and k, which a tap reads, and head results as z; returns their names."""
        points = site.points
        z, scores, pattern, rot_k = (points[n] for n in ("z", "attn_scores", "pattern", "rot_k"))
        result = z.name.replace("hook_z", "hook_result")
        quadratic = [p for p in (scores, pattern) if p.name in names]
        handled = {p.name for p in quadratic}
        lazy: list[tuple[str, bool]] = []
        if scores.may_edit or pattern.may_edit:  # recomputed rows would not contain the edits
            for point in quadratic:
                self._register(point, self._keep_rows)
        else:
            lazy = [(p.name, p is scores) for p in quadratic]
        grow_k = self.options.growing and site.tower == "text" and not rot_k.may_edit
        keep_k = grow_k and rot_k.name in names
        if keep_k:
            handled.add(rot_k.name)
        if lazy or keep_k:

            def tap(call: AttentionCall) -> None:
                self._tap(call, lazy, rot_k.name if keep_k else None, grow_k)

            self._stack.callback(site.remove_tap, tap)
            site.add_tap(tap)
        if result in names and not self.wiring.registry[result].may_edit:
            handled.add(result)
            o_proj = self.wiring.output_projection(site)
            state = state_of(o_proj)

            def keep_result(z: Tensor, *, hook: HookPoint) -> None:
                at = self._call(z.shape[1]) if hook.tower == "text" else None
                self._store(result, LazyResult(self._moved(self._sliced(z, hook)), o_proj, state), at)

            self._register(z, keep_result)
        return handled

    # -- keeping ---------------------------------------------------------------------------------------------------

    @property
    def _step(self) -> int:
        """The step that is cached; a forward pass has one, also where it computes a generated token."""
        return self.wiring.registry.context.step if self.options.generates else 0

    def _call(self, rows: int) -> tuple[int, int]:
        """The positions of the last `rows` rows of the call in progress."""
        run = self.wiring.registry.context.run
        first = self.options.first if run is None else run.first
        stop = first + (rows if run is None or run.rows is None else run.rows)
        return stop - rows, stop

    def _store(self, name: str, entry: Entry, at: tuple[int, int] | None = None, hidden: float = 0.0) -> None:
        """Keep an entry, whose rows of a sequence are `at` these positions."""
        if at is not None:
            first, stop = self.extents.get(self._step, at)
            self.extents[self._step] = min(first, at[0]), max(stop, at[1])
        part = Part(entry, *(at or (0, 0)), hidden)
        self.steps.setdefault(self._step, {}).setdefault(name, []).append(part)

    def _moved(self, x: Tensor) -> Tensor:
        x = x.detach()
        if self.options.device is not None and x.device != torch.device(self.options.device):
            return x.to(self.options.device)
        return x.clone() if self.options.copy else x

    def _copied(self, x: Tensor) -> Tensor:
        moved = self._moved(x)
        return moved.clone() if moved.data_ptr() == x.data_ptr() else moved

    def _sliced(self, x: Tensor, hook: HookPoint) -> Tensor:
        index = self.options.positions
        if index is None or hook.tower != "text" or x.dim() < 3 or self._step > 0:
            return x
        first, stop = (0, x.shape[1]) if _holds_all_keys(hook.name) else self._call(x.shape[1])
        run = self.wiring.registry.context.run
        if hook.name == "hook_logits" and (self.options.last_logits or (run is not None and first > run.first)):
            return x  # `logits_to_keep` has cut the position axis already
        # [batch pos ...] -> [batch n ...]
        return take(x, _local(index, len(x), first, stop)[0].to(x.device), dim=1)

    def _keep(self, x: Tensor, *, hook: HookPoint) -> None:
        at = None
        if hook.tower == "text":
            run = self.wiring.registry.context.run
            rows = run.rows if _holds_all_keys(hook.name) and run is not None else x.shape[1]
            at = self._call(x.shape[1] if rows is None else rows)
        self._store(hook.name, self._moved(self._sliced(x, hook)), at)

    def _keep_gradient(self, x: Tensor, *, hook: HookPoint) -> None:
        x = self._selected_rows(x, hook) if is_quadratic(hook.name) else self._sliced(x, hook)
        self.gradients.setdefault(hook.name + "_grad", []).append(self._moved(x))

    def _keep_rows(self, x: Tensor, *, hook: HookPoint) -> None:
        at = self._call(x.shape[2]) if hook.tower == "text" else None
        self._store(hook.name, self._moved(self._selected_rows(x, hook).float()), at, _hidden(hook.name, x))

    def _selected_rows(self, x: Tensor, hook: HookPoint) -> Tensor:
        queries, keys = self._row_and_column_index(hook.tower)
        first, stop = self._call(x.shape[2])
        offset = max(0, stop - x.shape[3])
        if queries is not None:
            # [batch head query key] -> [batch head n key]
            x = take(x, _local(queries, len(x), first, stop)[0].to(x.device), dim=2)
        return x if keys is None else take_columns(x, each_row(keys, len(x)), offset, _hidden(hook.name, x))

    def _row_and_column_index(self, tower: str) -> tuple[Index | None, Index | None]:
        if tower != "text":
            return None, None
        queries = self.options.queries if self.options.queries is not None else self.options.positions
        return (queries if self._step == 0 else None), self.options.keys

    def _tap(self, call: AttentionCall, lazy: list[tuple[str, bool]], rot_k: str | None, grow: bool) -> None:
        k: Tensor | GrowingKeys = self._grow(call) if grow else self._moved(call.k)
        q, at = call.q, self._call(call.q.shape[2]) if call.tower == "text" else None
        if rot_k is not None:
            # [batch kv_head key d_head] -> [batch key kv_head d_head]
            entry = LazyKeys(k, call.k.shape[2]) if isinstance(k, GrowingKeys) else k.transpose(1, 2)
            self._store(rot_k, entry, at)
        if not lazy:
            return
        queries, keys = self._row_and_column_index(call.tower)
        keys = None if keys is None else each_row(keys, len(q))
        if queries is not None and at is not None:
            queries, _ = _local(queries, len(q), *at)
            q = take(q, queries.to(q.device), dim=2)
        q = self._moved(q)
        mask = call.mask if self.options.device is None else call.mask.to(self.options.device)
        offset = 0 if at is None else max(0, at[1] - call.k.shape[2])  # a sliding window has dropped keys
        even = self.options.stop if at is not None and self._step == 0 and call.k.shape[2] < self.options.stop else None
        for name, scores in lazy:
            index, columns = _to(queries, q), _to(keys, q)
            pattern = LazyPattern(q, k, mask, call.scale, name, scores, index, columns, offset, even)
            self._store(name, value_of(pattern) if keys is not None and queries is not None else pattern, at)

    def _grow(self, call: AttentionCall) -> GrowingKeys | Tensor:
        keys = self._growing.setdefault(call.layer, GrowingKeys())
        new = call.q.shape[2]
        if keys.length + new != call.k.shape[2]:
            return self._copied(call.k)  # a KV cache of fixed size, which drops or overwrites keys
        keys.chunks.append(
            self._copied(call.k[:, :, -new:])
        )  # a view would keep the keys of all earlier steps in memory
        return keys

    # -- the result ------------------------------------------------------------------------------------------------

    def span(self, step: int) -> Span | None:
        """The positions of the rows of one step; None for a decoding step of which no row was kept."""
        if step:
            at = self.extents.get(step)
            return None if at is None else Span(*at, self.options.known, generated=True)
        first, stop = self.extents.get(0, (self.options.first, 0))
        return Span(min(first, self.options.first), max(stop, self.options.stop), self.options.known)

    def entries(self, step: int) -> dict[str, Entry]:
        """The entries of one step, in the order of the forward pass; those of several calls are joined."""
        kept, entries = self.steps.get(step, {}), {}
        for name, point in self.wiring.registry.hook_dict.items():
            if name in kept and point.tower == "text":
                entry = self._in_sequence(name, kept[name], step)
                entries[name] = entry if step else self._without_absent(name, entry)
            elif name in kept:
                entries[name] = self._joined([part.entry for part in kept[name]])
        return entries

    def gradient_entries(self) -> dict[str, Entry]:
        """The gradients, in the order of the backward pass, which reaches calls of the vision tower in reverse."""
        points = self.wiring.registry.hook_dict
        for name, parts in self.gradients.items():
            if len(parts) > 1 and points[name.removesuffix("_grad")].tower == "text":
                raise _recorded_twice(name)
        joined = {name: self._joined(parts[::-1]) for name, parts in self.gradients.items()}
        text = {name for name in joined if points[name.removesuffix("_grad")].tower == "text"}
        return {n: self._without_absent(n.removesuffix("_grad"), e) if n in text else e for n, e in joined.items()}

    def _without_absent(self, name: str, entry: Entry) -> Entry:
        """An entry with NaN at selected positions that a sample lacks; patterns that are computed later do the same."""
        dim, index = 1, self.options.positions
        if is_quadratic(name):
            dim, index = 2, index if self.options.queries is None else self.options.queries
        if isinstance(entry, LazyResult):
            return replace(entry, z=self._without_absent(name, entry.z))
        if index is None or not isinstance(entry, Tensor) or bool((index >= 0).all()):
            return entry
        absent = each_row(index, len(entry)) < 0  # [batch n]
        if entry.dim() <= dim or entry.shape[dim] != absent.shape[1]:
            return entry  # logits that `logits_to_keep` has cut
        return entry.masked_fill(
            absent.view(len(entry), *[1] * (dim - 1), -1, *[1] * (entry.dim() - dim - 1)), torch.nan
        )

    def _joined(self, parts: Sequence[Entry]) -> Entry:
        """One entry of several calls of an encoder: positions of one packed sequence, or tiles along the batch axis."""
        if len(parts) == 1:
            return parts[0]
        packed = self.options.packed_vision
        patterns = [part for part in parts if isinstance(part, LazyPattern)]
        if len(patterns) < len(parts):
            return torch.cat([value_of(part) for part in parts], dim=1 if packed else 0)
        dim = 2 if packed else 0  # [batch head pos d_head]
        q, k = torch.cat([p.q for p in patterns], dim), torch.cat([p.keys() for p in patterns], dim)
        segments = tuple(s for p in patterns for s in p.mask.segments or ()) if packed else None
        return replace(patterns[0], q=q, k=k, mask=patterns[0].mask.resized(len(q), q.shape[2], segments))

    def _in_sequence(self, name: str, parts: Sequence[Part], step: int) -> Entry:
        """One entry of the calls of the language model: several where a prompt is read in chunks."""
        early = step > 0 and parts[0].first < self.options.stop  # a decoding step at positions of the prompt
        if early or any(after.first < before.stop for before, after in pairwise(parts)):
            raise _recorded_twice(name)
        span = self.span(step)
        assert span is not None  # of the rows of these parts
        gaps = name.endswith("hook_deepstack") and (parts[0].first, parts[-1].stop) != (span.first, span.stop)
        if len(parts) == 1 and not gaps:
            return parts[0].entry
        if _holds_all_keys(name):
            return parts[-1].entry
        if name == "hook_logits" and self.options.last_logits:
            return self._last_logits(parts)
        index = self.options.positions
        if is_quadratic(name):
            index = self._row_and_column_index("text")[0]
        entries = [part.entry for part in parts]
        if index is None and name.endswith("hook_deepstack"):  # not computed in chunks without visual tokens
            index = torch.arange(span.first, span.stop).expand(entries[0].shape[0], -1)
        owned = None if index is None else [_local(index, p.entry.shape[0], p.first, p.stop)[1] for p in parts]
        if is_quadratic(name):
            calls = [entry for entry in entries if isinstance(entry, LazyPattern)]
            if len(calls) < len(parts):
                return self._rows(parts, owned)
            return LazyRows.of(calls, owned)
        if isinstance(entries[0], LazyResult):
            zs = [entry.z for entry in entries if isinstance(entry, LazyResult)]
            return replace(entries[0], z=by_position(zs, owned, dim=1))
        return by_position([value_of(entry) for entry in entries], owned, dim=1)

    def _rows(self, parts: Sequence[Part], owned: list[Tensor] | None) -> Tensor:
        """Computed patterns or scores of chunks: later ones have more keys, and a window may have dropped the first."""
        values = [value_of(part.entry) for part in parts]
        offsets = [0 if self.options.keys is not None else max(0, p.stop - p.entry.shape[3]) for p in parts]
        width = max(o + v.shape[3] for o, v in zip(offsets, values, strict=True))
        padded = [
            pad(value, (offset, width - offset - value.shape[3]), value=part.hidden)
            for value, offset, part in zip(values, offsets, parts, strict=True)
        ]
        return by_position(padded, owned, dim=2)

    def _last_logits(self, parts: Sequence[Part]) -> Tensor:
        """The logits of the last positions, of which each chunk has some."""
        values = [value_of(parts[-1].entry)]
        for before, after in reversed(list(pairwise(parts))):
            if before.stop < after.first:
                break
            values.insert(0, value_of(before.entry))
        return torch.cat(values, dim=1)[:, -self.options.last_logits :]


def _local(index: Index, batch: int, first: int, stop: int) -> tuple[Index, Bool[Tensor, "batch _"]]:
    """The selected positions that are rows `first` to `stop`, as rows; and which entries of `index` they are."""
    index = each_row(index, batch)
    own = (index >= first) & (index < stop)
    return torch.where(own, index - first, -1)[:, own.any(0)], own


def _holds_all_keys(name: str) -> bool:
    """Whether an activation has a row for every key of a KV cache, not for the tokens of one call."""
    return name.endswith("hook_rot_k")


def _hidden(name: str, x: Tensor) -> float:
    """The value of a computed pattern, or of computed scores, at keys that are not visible."""
    return torch.finfo(x.dtype).min if name.endswith("scores") else 0.0


def _recorded_twice(name: str) -> HookValueError:
    return HookValueError(
        f"{name} was computed twice for the same positions in this run, and the two are not distinguished. "
        "A hook called `hf_model` or one of its modules: call the HookedMLLM there, whose runs have their own caches."
    )


def _to(index: Index | None, like: Tensor) -> Index | None:
    return None if index is None else index.to(like.device)
