"""Caching of activations during a forward pass or a generation: what is kept, and in which form."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_mllm.attention.site import AttentionCall, AttentionSite
from hooked_mllm.cache.lazy import Entry, GrowingKeys, LazyKeys, LazyPattern, LazyResult, take, value_of
from hooked_mllm.hooks.point import Handle, HookPoint
from hooked_mllm.hooks.table import is_quadratic
from hooked_mllm.wiring.model import Wiring

#: positions of each sample, -1 where a sample has fewer than the others
Index: TypeAlias = Int[Tensor, "batch _"]


@dataclass
class CaptureOptions:
    """What a run caches.

    Attributes:
        points: Hook points to cache.
        gradients: Hook points whose gradients to cache.
        device: The device of the cached tensors; None leaves each where it was computed.
        positions: Positions to keep of language-model activations.
        queries: Rows of patterns and scores to keep.
        keys: Columns of patterns and scores to keep.
        growing: Whether the keys of each step extend those of the step before (a plain generation).
        copy: Whether activations may be edited in place after they are cached, so that copies are needed.
        packed_vision: Whether vision activations of several tower calls are joined along positions.
    """

    points: list[HookPoint]
    gradients: list[HookPoint]
    device: torch.device | str | None = None
    positions: Index | None = None
    queries: Index | None = None
    keys: Index | None = None
    growing: bool = False
    copy: bool = False
    packed_vision: bool = False


class Capture:
    """A context in which activations are cached, one dictionary of entries for each step of the run."""

    def __init__(self, wiring: Wiring, options: CaptureOptions) -> None:
        self.wiring, self.options = wiring, options
        self.steps: dict[int, dict[str, list[Entry]]] = {}
        self.gradients: dict[str, list[Tensor]] = {}
        self._scope = ExitStack()
        self._handles: list[tuple[HookPoint, Handle]] = []
        self._taps: list[tuple[AttentionSite, Callable[[AttentionCall], None]]] = []
        self._growing: dict[int, GrowingKeys] = {}

    # -- registering hooks ---------------------------------------------------------------------------------------------

    def __enter__(self) -> "Capture":
        context = self.wiring.registry.context
        scope = self._scope.enter_context(context.scope(of_run=True))
        try:
            with context.registers_in(scope):
                self._attach()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for point, handle in self._handles:
            point.remove(handle)
        for site, tap in self._taps:
            site.remove_tap(tap)
        self._handles, self._taps = [], []
        self._scope.close()

    def _attach(self) -> None:
        names = {p.name for p in self.options.points}
        for tower, sites in (("text", self.wiring.text), ("vision", self.wiring.vision)):
            for site in sites:
                names -= self._attach_attention(site, names, tower)
        for point in self.options.points:
            if point.name in names:
                self._register(point, self._keep)
        for point in self.options.gradients:
            self._handles.append((point, point.add_hook(self._keep_gradient, "bwd")))

    def _register(self, point: HookPoint, fn: Callable[..., None]) -> None:
        self._handles.append((point, point.add_hook(fn, reads_only=True)))

    def _attach_attention(self, site: AttentionSite, names: set[str], tower: str) -> set[str]:
        """Cache scores, patterns, keys of a generation and head results without a forward hook of their own.

        Patterns and scores are computed later from q and k, head results from z; a tap reads q and k.

        Returns:
            The names that are cached in this way.
        """
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
        grow_k = self.options.growing and tower == "text" and not rot_k.may_edit
        keep_k = grow_k and rot_k.name in names
        if keep_k:
            handled.add(rot_k.name)
        if lazy or keep_k:

            def tap(call: AttentionCall) -> None:
                self._tap(call, lazy, rot_k.name if keep_k else None, grow_k)

            self._taps.append((site, tap))
            site.add_tap(tap)
        if result in names and not self.wiring.registry[result].may_edit:
            handled.add(result)
            o_proj = self.wiring.output_projection(site)

            def keep_result(z: Tensor, *, hook: HookPoint) -> None:
                self._store(result, LazyResult(self._moved(self._sliced(z, hook)), o_proj))

            self._register(z, keep_result)
        return handled

    # -- keeping ---------------------------------------------------------------------------------------------------

    def _store(self, name: str, entry: Entry) -> None:
        step = self.wiring.registry.context.step
        self.steps.setdefault(step, {}).setdefault(name, []).append(entry)

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
        if index is None or hook.tower != "text" or x.dim() < 3 or hook.step > 0:
            return x
        if hook.name == "hook_logits" and x.shape[1] < int(index.max()) + 1:
            return x  # `logits_to_keep` has cut the position axis already
        return take(x, index.to(x.device), dim=1)  # [batch pos ...] -> [batch n ...]

    def _keep(self, x: Tensor, *, hook: HookPoint) -> None:
        self._store(hook.name, self._moved(self._sliced(x, hook)))

    def _keep_gradient(self, x: Tensor, *, hook: HookPoint) -> None:
        x = self._selected_rows(x, hook) if is_quadratic(hook.name) else self._sliced(x, hook)
        self.gradients.setdefault(hook.name + "_grad", []).append(self._moved(x))

    def _keep_rows(self, x: Tensor, *, hook: HookPoint) -> None:
        self._store(hook.name, self._moved(self._selected_rows(x, hook).float()))

    def _selected_rows(self, x: Tensor, hook: HookPoint) -> Tensor:
        queries, keys = self._row_and_column_index(hook.tower, hook.step)
        if queries is not None:
            x = take(x, queries.to(x.device), dim=2)  # [batch head query key] -> [batch head n key]
        return x if keys is None else take(x, keys.to(x.device), dim=3)

    def _row_and_column_index(self, tower: str, step: int) -> tuple[Index | None, Index | None]:
        if tower != "text":
            return None, None
        queries = self.options.queries if self.options.queries is not None else self.options.positions
        return (queries if step == 0 else None), self.options.keys

    def _tap(self, call: AttentionCall, lazy: list[tuple[str, bool]], rot_k: str | None, grow: bool) -> None:
        step = self.wiring.registry.context.step
        k: Tensor | GrowingKeys = self._grow(call) if grow else self._moved(call.k)
        if rot_k is not None:
            # [batch kv_head key d_head] -> [batch key kv_head d_head]
            entry = LazyKeys(k, call.k.shape[2]) if isinstance(k, GrowingKeys) else k.transpose(1, 2)
            self._store(rot_k, entry)
        if not lazy:
            return
        queries, keys = self._row_and_column_index(call.tower, step)
        q = call.q if queries is None else take(call.q, queries.to(call.q.device), dim=2)
        q = self._moved(q)
        mask = call.mask if self.options.device is None else call.mask.to(self.options.device)
        for name, scores in lazy:
            pattern = LazyPattern(q, k, mask, call.scale, name, scores, index=_to(queries, q), columns=_to(keys, q))
            self._store(name, value_of(pattern) if keys is not None and queries is not None else pattern)

    def _grow(self, call: AttentionCall) -> GrowingKeys | Tensor:
        keys = self._growing.setdefault(call.layer, GrowingKeys())
        new = call.q.shape[2]
        if keys.length + new != call.k.shape[2]:
            return self._copied(call.k)  # a KV cache of fixed size, which drops or overwrites keys
        keys.append(self._copied(call.k[:, :, -new:]))  # a view would keep the keys of all earlier steps in memory
        return keys

    # -- the result ------------------------------------------------------------------------------------------------

    def entries(self, step: int) -> dict[str, Entry]:
        """The entries of one step, in the order of the forward pass; those of several tower calls are joined."""
        kept = self.steps.get(step, {})
        order = {name: index for index, name in enumerate(self.wiring.registry.hook_dict)}
        names = sorted(kept, key=lambda name: order[name])
        return {name: self._joined(kept[name]) for name in names}

    def gradient_entries(self) -> dict[str, Entry]:
        """The gradients, in the order of the backward pass.

        The backward pass reaches several calls of the vision tower in reverse; joined, they are in the order of the
        activations.
        """
        return {name: self._joined(list(reversed(parts))) for name, parts in self.gradients.items()}

    def _joined(self, parts: list[Entry]) -> Entry:
        if len(parts) == 1:
            return parts[0]
        if _are_patterns(parts):
            return _join_patterns(parts, self.options.packed_vision)
        tensors = [value_of(p) for p in parts]
        return torch.cat(tensors, dim=1 if self.options.packed_vision else 0)


def _are_patterns(parts: list[Entry]) -> TypeGuard[list[LazyPattern]]:
    return all(isinstance(p, LazyPattern) for p in parts)


def _join_patterns(parts: list[LazyPattern], packed: bool) -> LazyPattern:
    first = parts[0]
    dim = 2 if packed else 0  # positions of one packed sequence, or tiles along the batch axis
    q, k = torch.cat([p.q for p in parts], dim), torch.cat([p.keys() for p in parts], dim)
    if packed:
        segments = tuple(s for p in parts for s in (p.mask.segments or ()))
        mask = first.mask.resized(batch=1, length=q.shape[2], segments=segments)
    else:
        mask = first.mask.resized(batch=q.shape[0], length=q.shape[2])
    return LazyPattern(q, k, mask, first.scale, first.name, first.scores)


def _to(index: Index | None, like: Tensor) -> Index | None:
    return None if index is None else index.to(like.device)
