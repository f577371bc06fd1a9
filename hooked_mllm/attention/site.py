"""The attention of one block with hooks on q, k, scores, pattern and z, and taps that only read.

Scores and patterns are computed explicitly only where a hook may edit them; the model's own attention runs otherwise.
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
from hooked_mllm.attention.masks import MaskRows, call_sizes, prompt_part
from hooked_mllm.attention.registered import REGISTERED, shape_of
from hooked_mllm.errors import HookValueError
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.run_context import Scope


@dataclass
class AttentionCall:
    """The inputs of one attention call: q `[batch head query d_head]`, k, v `[batch kv_head key d_head]`, the mask."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    mask: MaskRows
    scale: float
    tower: str


#: a function of an attention call, which does not edit it
Tap = Callable[[AttentionCall], None]


@dataclass(eq=False, repr=False)
class AttentionSite:
    """The attention of one block of the text or the vision tower, with the hook points rot_q to z by suffix."""

    module: nn.Module
    layer: int
    tower: str
    switch: TowerSwitch
    #: whether a missing mask means causal
    causal: bool
    #: whether the model's eager attention computes its softmax in float32
    softmax_float32: bool
    points: dict[str, HookPoint]
    #: whether a hook, a tap or a backend needs the site
    in_use: bool = False

    def __post_init__(self) -> None:
        self.context = next(iter(self.points.values())).context
        self._taps: tuple[tuple[Tap, Scope | None], ...] = ()
        self.switch.sites.append(ref(self))
        self.name = self.points["z"].name.removesuffix(".hook_z")
        for name in ("rot_q", "rot_k", "z"):  # scores and pattern are copies, which the model's own attention lacks
            self.points[name].live = True
        add_site(self.module, self)

    @property
    def taps(self) -> list[Tap]:
        """The taps that are active in this thread, task and run."""
        return [tap for tap, scope in self._taps if self.context.sees(scope)]

    @property
    def has_taps(self) -> bool:
        """Whether any thread has a tap."""
        return bool(self._taps)

    @property
    def backend(self) -> AttentionBackend | None:
        """The backend that is active in this thread and task."""
        return self.switch.backend

    @property
    def running(self) -> AttentionBackend | None:
        """The active backend: one that was chosen, or the one registered under the name that the tower runs."""
        registered, backend = REGISTERED.get(self.switch.base), self.backend
        return registered.hybrid if backend is None and registered is not None else backend

    @property
    def implementation(self) -> Callable[..., Any]:
        """The function of transformers that computes this attention where no backend does."""
        return implementation(self.module, self.switch.base)

    def refresh(self) -> None:
        """Enable or disable the tower's hooked variant, as points, taps and backend need it."""
        needed = bool(self._taps) or self.switch.has_backend or any(p.registered for p in self.points.values())
        if needed and not self.in_use:
            self.switch.take()
        elif self.in_use and not needed:
            self.switch.give_back()
        self.in_use = needed

    def add_tap(self, tap: Tap) -> None:
        """Call `tap` at every attention call; it must not edit."""
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
        """The attention function: q, k, v `[batch head pos d_head]` -> z `[batch pos head d_head]`, weights."""
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        points = self.points
        if points["rot_q"].active:
            query = _headed(points["rot_q"], query)
        if points["rot_k"].active:
            # k is the tensor of the KV cache: what a hook edits in place must be a copy
            key = _headed(points["rot_k"], key.clone() if points["rot_k"].may_edit else key)
        packed, base = kwargs.get("cu_seq_lens_q"), self.switch.base  # bounds of packed images
        segments = None if packed is None else tuple(packed.diff().tolist())
        slim = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 and base in WIDE
        taps = self.taps
        observed = bool(taps) or points["attn_scores"].active or points["pattern"].active
        backend, mask, run = self.backend, None, self.context.run
        if run is not None and (taps or backend is not None):
            run.fired.add(self.name)
        if observed or backend is not None or slim:
            backend = self.running
            mask = own = MaskRows.of(
                attention_mask,
                **call_sizes(query, key),
                causal=self.causal,
                window=kwargs.get("sliding_window") if attention_mask is None else None,
                segments=segments,
                upper_left="flash" not in base,
            )
            if restricts(backend):
                if backend is not self.backend:
                    REGISTERED[base].check_heads(query, *shape_of(self.module))
                elif run is not None and run.prompt_length is not None and self.tower == "text":
                    mask.prompt = prompt_part(run.first, run.first + query.shape[2], run.prompt_length)
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
                expected = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
                if not isinstance(z, Tensor) or tuple(z.shape) != expected:
                    got = list(z.shape) if isinstance(z, Tensor) else f"a {type(z).__name__}"
                    raise HookValueError(
                        f"The attention backend {backend!r} returned {got} in layer {self.layer}; expected z "
                        f"[batch query head d_head], {[*expected]} (what torch's SDPA gives, after .transpose(1, 2))."
                    )
                return z, None
            return self._own((query, key, value), attention_mask, segments, base, kwargs)

        explicit = None
        if mask is not None and (points["attn_scores"].active or points["pattern"].active):
            explicit = self._explicit(query, key, value, mask, scale)
        if explicit is None:
            z, weights = attend()
        else:
            z, blind, pattern = explicit
            weights = pattern if base == "eager" else None  # as the other layers: a list of them would be misaligned
            if bool(blind.any()):  # padded queries without visible keys keep the output of the model's own attention
                z = torch.where(blind[..., None], attend()[0], z)
        if points["z"].active:
            z, _ = points["z"].run(z)
        return z, weights

    def _own(
        self, qkv: tuple[Tensor, ...], mask: Any, segments: tuple[int, ...] | None, base: str, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        run = implementation(self.module, base)
        if segments is None or "flash" in base:
            return run(self.module, *qkv, mask, **kwargs)
        # each image attends to itself: the same calls, on the same chunks, as transformers makes without packing
        plain = {k: v for k, v in kwargs.items() if not k.startswith(("cu_seq_lens_", "max_length_"))}
        chunks = zip(*(torch.split(t, list(segments), dim=2) for t in qkv), strict=True)
        return torch.cat([run(self.module, *c, mask, **plain)[0] for c in chunks], dim=1), None

    def _explicit(
        self, query: Tensor, key: Tensor, value: Tensor, mask: MaskRows, scale: float
    ) -> tuple[Tensor, Bool[Tensor, "batch query mask_head"], Tensor] | None:
        """Z by scores and pattern with their hooks, queries without visible keys, the pattern; None without edits."""
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
        return z, ~visible.any(-1).transpose(1, 2), pattern


def _headed(point: HookPoint, tensor: Float[Tensor, "batch head pos d_head"]) -> Float[Tensor, "batch head pos d_head"]:
    """Run a point on `[batch pos head d_head]`, the axes of q and k in hooks."""
    value, edited = point.run(tensor.transpose(1, 2))
    return value.transpose(1, 2) if edited else tensor


def _repeat(tensor: Float[Tensor, "batch kv_head key d_head"], groups: int) -> Float[Tensor, "batch head key d_head"]:
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)
