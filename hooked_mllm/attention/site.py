"""The attention of one block with hooks on q, k, scores, pattern and z, and taps that only read.

The forward keeps its own fast attention. Scores and patterns are computed explicitly only where a hook may edit them,
for that layer and that call, and what the fast attention gave is kept unless a hook did edit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_mllm.attention.backends import (
    WIDE,
    AttentionBackend,
    TowerSwitch,
    add_site,
    implementation,
    restricts,
    widened,
)
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.registered import REGISTERED, shape_of
from hooked_mllm.errors import HookValueError
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.run_context import Scope


@dataclass
class AttentionCall:
    """What one attention module was called with: q, k, v after position encoding, and the mask.

    Shapes: q `[batch head query d_head]`, k, v `[batch kv_head key d_head]`.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: MaskRows
    scale: float
    tower: str


#: a function of an attention call, which does not edit it
Tap = Callable[[AttentionCall], None]


class AttentionSite:
    """The attention of one block, wherever it is: text or vision.

    Args:
        module: The attention module.
        layer: The block's index in its tower.
        tower: "text" or "vision".
        switch: The tower's switch.
        causal: Whether a missing mask means causal.
        softmax_float32: Whether the model's eager attention takes its softmax in float32.
        points: Hook points by suffix: rot_q, rot_k, attn_scores, pattern, z.
    """

    def __init__(
        self,
        module: nn.Module,
        layer: int,
        tower: str,
        switch: TowerSwitch,
        causal: bool,
        softmax_float32: bool,
        points: dict[str, HookPoint],
    ) -> None:
        self.module = module
        self.layer = layer
        self.tower = tower
        self.switch = switch
        self.causal = causal
        self.softmax_float32 = softmax_float32
        self.points = points
        self.context = next(iter(points.values())).context
        self._taps: tuple[tuple[Tap, Scope | None], ...] = ()
        self._on = False
        switch.sites.append(ref(self))
        for name in ("rot_q", "rot_k", "z"):  # scores and pattern are copies, which the model's own attention lacks
            points[name].live = True
        add_site(module, self)

    @property
    def in_use(self) -> bool:
        """Whether a hook, a tap or a backend needs it."""
        return self._on

    @property
    def taps(self) -> list[Tap]:
        """The taps that are active in this thread, task and run."""
        return [tap for tap, scope in self._taps if self.context.sees(scope)]

    @property
    def backend(self) -> AttentionBackend | None:
        """The backend that is active in this thread and task."""
        return self.switch.backend

    @property
    def running(self) -> AttentionBackend | None:
        """The backend in use: the site's own, or the one registered under the name that the tower runs."""
        return self._running(self.switch.base)

    @property
    def implementation(self) -> Callable[..., Any]:
        """The function of transformers that computes this attention where no backend does."""
        return implementation(self.module, self.switch.base)

    def _running(self, base: str) -> AttentionBackend | None:
        registered = REGISTERED.get(base)
        return registered.hybrid if self.backend is None and registered is not None else self.backend

    def refresh(self) -> None:
        """Take or give back the tower's switch, as points, taps and backend need it."""
        needed = bool(self._taps) or self.switch.has_backend or any(p.registered for p in self.points.values())
        if needed and not self._on:
            self.switch.take()
        elif self._on and not needed:
            self.switch.give_back()
        self._on = needed

    def add_tap(self, tap: Tap) -> None:
        """Let `tap` look at every call; it must not edit."""
        with self.context.lock:  # never while another thread runs the model
            self._taps = (*self._taps, (tap, self.context.registering))
            self.refresh()

    def remove_tap(self, tap: Tap) -> None:
        """Remove a tap; one that was removed before is ignored."""
        with self.context.lock:
            self._taps = tuple(pair for pair in self._taps if pair[0] != tap)
            self.refresh()

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """What transformers calls: q, k, v `[batch head pos d_head]` in; z `[batch pos head d_head]`, weights out."""
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        points = self.points
        if points["rot_q"].active:
            query = _headed(points["rot_q"], query)
        if points["rot_k"].active:
            # These are the very tensors of the KV cache: what a hook edits in place must be a copy.
            key = _headed(points["rot_k"], key.clone() if points["rot_k"].may_edit else key)
        segments, base = _segments(kwargs), self.switch.base
        slim = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and base in WIDE
        taps = self.taps
        looked_at = bool(taps) or points["attn_scores"].active or points["pattern"].active
        backend, mask = self.backend, None
        if looked_at or backend is not None or slim:
            backend = self._running(base)
            mask = own = MaskRows.of(
                attention_mask,
                batch=query.shape[0],
                q_length=query.shape[2],
                kv_length=key.shape[2],
                device=query.device,
                causal=self.causal,
                window=kwargs.get("sliding_window") if attention_mask is None else None,
                segments=segments,
                upper_left="flash" not in base,
            )
            if restricts(backend):
                if backend is not self.backend:
                    REGISTERED[base].check_heads(query, *shape_of(self.module))
                if kwargs.get("sliding_window") is None:
                    mask = backend.restrict(query, key, own, scale, self.layer)
                backend = None if mask is own else backend
                if backend is not None and kwargs.get("dropout"):
                    raise HookValueError(
                        f"The model is in training mode with attention dropout {kwargs['dropout']}, which "
                        f"{type(backend).__name__} has not: call model.hf_model.eval()."
                    )
            if slim and backend is None:
                attention_mask = widened(own, base, query.dtype)
            call = AttentionCall(self.layer, query, key, value, mask, scale, self.tower)
            for tap in taps:
                tap(call)

        def attend() -> tuple[Tensor, Tensor | None]:
            if backend is not None and mask is not None:
                z = backend(query, key, value, mask, scale, self.layer)
                due = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
                if not isinstance(z, Tensor) or tuple(z.shape) != due:
                    got = list(z.shape) if isinstance(z, Tensor) else f"a {type(z).__name__}"
                    raise HookValueError(
                        f"The attention backend {backend!r} returned {got} in layer {self.layer}; expected z "
                        f"[batch query head d_head], {list(due)} (what torch's SDPA gives, after .transpose(1, 2))."
                    )
                return z, None
            return self._own(query, key, value, attention_mask, segments, base, kwargs)

        explicit = None
        if mask is not None and (points["attn_scores"].active or points["pattern"].active):
            explicit = self._explicit(query, key, value, mask, scale)
        if explicit is None:
            z, weights = attend()
        else:
            z, blind = explicit
            weights = None
            if bool(blind.any()):  # padded queries see nothing: leave them what the model's own attention makes of that
                z = torch.where(blind[..., None], attend()[0], z)
        if points["z"].active:
            z, _ = points["z"].run(z)
        return z, weights

    def _own(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        segments: tuple[int, ...] | None,
        base: str,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        run = implementation(self.module, base)
        if segments is None or "flash" in base:
            return run(self.module, query, key, value, attention_mask, **kwargs)
        # Each image attends to itself: the same calls, on the same chunks, as transformers makes without packing.
        plain = {k: v for k, v in kwargs.items() if k not in _PACKED_ARGUMENTS}
        chunks = zip(*(torch.split(t, list(segments), dim=2) for t in (query, key, value)), strict=True)
        return torch.cat([run(self.module, *c, attention_mask, **plain)[0] for c in chunks], dim=1), None

    def _explicit(
        self, query: Tensor, key: Tensor, value: Tensor, mask: MaskRows, scale: float
    ) -> tuple[Tensor, Bool[Tensor, "batch query mask_head"]] | None:
        """Z through scores and pattern, with their hooks, and which queries see nothing, by head if heads differ.

        None if no hook edited and no gradient is watched: what the model's own attention gives is then the answer.
        """
        groups = query.shape[1] // key.shape[1]
        visible = mask.head_rows(torch.arange(mask.q_length, device=mask.device).expand(mask.batch, -1))
        scores = torch.matmul(query, _repeat(key, groups).transpose(2, 3)) * scale
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        scores, edited_scores = self.points["attn_scores"].run(scores)
        dtype = torch.float32 if self.softmax_float32 else scores.dtype
        pattern = torch.softmax(scores, dim=-1, dtype=dtype).to(query.dtype)
        pattern, edited_pattern = self.points["pattern"].run(pattern)
        if not (edited_scores or edited_pattern):
            return None
        z = torch.matmul(pattern, _repeat(value, groups)).transpose(1, 2).contiguous()
        return z, ~visible.any(-1).transpose(1, 2)


_PACKED_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _segments(kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """Lengths of the packed images, where the call is a packed one."""
    bounds = kwargs.get("cu_seq_lens_q")
    return None if bounds is None else tuple((bounds[1:] - bounds[:-1]).tolist())


def _headed(point: HookPoint, tensor: Float[Tensor, "batch head pos d_head"]) -> Float[Tensor, "batch head pos d_head"]:
    """Run a point on `[batch pos head d_head]`, which is how a user sees q and k."""
    value, edited = point.run(tensor.transpose(1, 2))
    return value.transpose(1, 2) if edited else tensor


def _repeat(tensor: Float[Tensor, "batch kv_head key d_head"], groups: int) -> Float[Tensor, "batch head key d_head"]:
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)
