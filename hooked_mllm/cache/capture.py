"""Caching of activations during a forward pass or a generation: what is kept, and in which form."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_mllm.attention.site import AttentionCall, AttentionSite
from hooked_mllm.cache.lazy import Entry, GrowingKeys, LazyKeys, LazyPattern, LazyResult, take, value_of
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


class Capture:
    """A context in which activations are cached, one dictionary of entries for each step of the run."""

    def __init__(self, wiring: Wiring, options: CaptureOptions) -> None:
        self.wiring, self.options = wiring, options
        self.steps: dict[int, dict[str, list[Entry]]] = {}
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
                self._store(result, LazyResult(self._moved(self._sliced(z, hook)), o_proj, state))

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
        keys.chunks.append(
            self._copied(call.k[:, :, -new:])
        )  # a view would keep the keys of all earlier steps in memory
        return keys

    # -- the result ------------------------------------------------------------------------------------------------

    def entries(self, step: int) -> dict[str, Entry]:
        """The entries of one step, in the order of the forward pass; those of several tower calls are joined."""
        kept = self.steps.get(step, {})
        return {name: self._joined(kept[name]) for name in self.wiring.registry.hook_dict if name in kept}

    def gradient_entries(self) -> dict[str, Entry]:
        """The gradients, in the order of the backward pass, which reaches calls of the vision tower in reverse."""
        return {name: self._joined(parts[::-1]) for name, parts in self.gradients.items()}

    def _joined(self, parts: Sequence[Entry]) -> Entry:
        """One entry of several calls: positions of one packed sequence, or tiles along the batch axis."""
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


def _to(index: Index | None, like: Tensor) -> Index | None:
    return None if index is None else index.to(like.device)
