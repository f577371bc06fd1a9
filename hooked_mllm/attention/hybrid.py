"""Hybrid attention as a backend of a model: some heads dense, the others with a sink and a window, in prefill only."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.routing.static import FixedHeads
from hooked_mllm.attention.streaming import StreamingHeads
from hooked_mllm.checks import checked
from hooked_mllm.errors import HeadError, UnsupportedModelError
from hooked_mllm.heads import HeadsLike, head_names
from hooked_mllm.kernels.hybrid_attention import hybrid_attention
from hooked_mllm.kernels.hybrid_attention.op import head_numbers
from hooked_mllm.kernels.implementations import Implementation, Keys, Queries, check_implementation
from hooked_mllm.kernels.streaming_window import WholeNumber, check_sink_and_window


@runtime_checkable
class RoutingPolicy(Protocol):
    """Chooses the dense heads of a layer from the prompt itself."""

    def choose(self, q: Queries, k: Keys, mask: MaskRows, scale: float, layer: int) -> tuple[int, ...]:
        """The dense query heads of this layer, one set for all samples of the batch.

        q `[batch head query d_head]`, k `[batch kv_head key d_head]`, after position encoding.
        """
        ...

    def validate(self, n_layers: int, n_heads: int) -> None:
        """Raise if the policy does not fit a model of this shape."""
        ...

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        ...


class HybridAttention:
    r"""Attention in which some heads see everything before them and the others a sink and a window, in prefill.

    $$V_h(i) = \{j \le i\}\ (h\ \text{dense}),\qquad
    V_h(i) = \{j \le i : j < \text{sink or } j > i - \text{window}\}\ (\text{otherwise})$$

    A backend for `HookedMLLM.from_pretrained(attention=...)` or `model.attention(...)`. Steps of decoding and layers
    with a sliding window run the model's attention. Patterns, scores and metrics are those of the hybrid mask.

    Args:
        dense: The dense heads: a `HeadSet`, "L2H4, L3H1", pairs (layer, head), a boolean mask `[layer head]`, a mapping
            of layers to query heads, a list of these, or a routing policy. Query heads, as of `HeadScores`; may be
            empty.
        sink: First tokens that streaming heads see.
        window: Last tokens that they see, the query's own included.
        implementation: "auto", "triton" or "naive", as in `hybrid_attention`.

    Raises:
        HeadError: For other values; at a model, for heads that it lacks.
        InputError: For a sink below 0 or a window below 1.
        HookValueError: For an unknown implementation.
        UnsupportedModelError: For attention that is not causal.

    Source: arXiv:2606.05843, algorithm 3.

    Examples:
        >>> from hooked_mllm import HookedMLLM, HybridAttention, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> with model.attention(HybridAttention(["L2H4"], sink=4, window=16, implementation="naive")):
        ...     tokens = model.generate(sample, max_new_tokens=1)
        ...     model.info.attention
        'hybrid(1 heads dense, sink=4, window=16; sdpa)'
    """

    @checked
    def __init__(
        self, dense: HeadsLike | RoutingPolicy, *, sink: WholeNumber = 64, window: WholeNumber = 1024,
        implementation: Implementation = "auto",
    ) -> None:  # fmt: skip
        #: whether heads were specified, and no policy
        self._named = not isinstance(dense, RoutingPolicy)
        self.policy: RoutingPolicy = dense if isinstance(dense, RoutingPolicy) else FixedHeads(dense)
        self._checked_head_counts: set[int] = set()
        self.sink, self.window = check_sink_and_window(sink, window)
        check_implementation(implementation)
        self.implementation: Implementation = implementation
        set_streaming = getattr(self.policy, "set_streaming", None)
        if set_streaming is not None:
            set_streaming(self.sink, self.window)

    @property
    def adaptive(self) -> bool:
        """Whether the dense heads depend on the prompts of a batch."""
        return not isinstance(self.policy, FixedHeads)

    def __repr__(self) -> str:
        if self._named and isinstance(self.policy, FixedHeads):
            dense = f"{len(self.policy)} heads"
        else:  # the default repr is an address, another in every run
            has_repr = type(self.policy).__repr__ is not object.__repr__
            dense = repr(self.policy) if has_repr else type(self.policy).__name__
        return f"HybridAttention({dense} dense, sink={self.sink}, window={self.window})"

    def __str__(self) -> str:
        return repr(self).replace("HybridAttention", "hybrid", 1)

    def validate(self, n_layers: int, n_heads: int, causal: bool) -> None:
        """Raise a `HeadError` for heads of another model, an `UnsupportedModelError` for a tower that is not causal."""
        if not causal:
            raise UnsupportedModelError(
                "HybridAttention is causal, and a vision tower is not: leave the tower on attention='sdpa'."
            )
        self._checked_head_counts.add(n_heads)
        self.policy.validate(n_layers, n_heads)

    def describe(self) -> dict[str, Any]:
        """The settings that reproduce it, as values that JSON can hold: heads in order, or the policy."""
        dense: Any = self.policy.describe()
        if self._named and isinstance(self.policy, FixedHeads):
            dense = head_names(sorted(self.policy.heads))
        return {"backend": "HybridAttention", "dense": dense, "sink": self.sink, "window": self.window}

    def _streaming(self, q: Tensor, k: Tensor, mask: MaskRows, scale: float, layer: int) -> StreamingHeads:
        if self._checked_head_counts and q.shape[1] not in self._checked_head_counts:
            raise HeadError(
                f"This call has {q.shape[1]} heads, the model {min(self._checked_head_counts)}: heads that are spread "
                "over processes have other numbers. Spread the layers instead (device_map), or use attention='sdpa'."
            )
        heads = self.policy.choose(q, k, mask, scale, layer)
        if self.adaptive:
            try:
                heads = tuple(head_numbers(heads, q.shape[1]))
            except HeadError as error:
                raise HeadError(f"{type(self.policy).__name__}.choose in layer {layer}: {error}") from None
        return StreamingHeads(heads, q.shape[1], self.sink, self.window)

    def restrict(self, q: Tensor, k: Tensor, mask: MaskRows, scale: float, layer: int) -> MaskRows:
        """The mask of each head in one call; `mask` itself where all heads are dense."""
        if mask.prompt == "generated" or (mask.prompt is None and mask.q_length == 1):
            return mask
        if mask.prompt == "part" and self.adaptive:
            raise UnsupportedModelError(
                f"{type(self.policy).__name__} chooses heads from the whole prompt, and this call has a part of it: "
                "run the prompt at once, without prefill_chunk_size, or give the heads: HybridAttention(heads)."
            )
        if mask.prompt == "both":
            raise UnsupportedModelError(
                "Hybrid attention is for the prompt, and this call has generated tokens, too (use_cache=False, or "
                "candidates of assisted decoding): generate with a KV cache and without candidates."
            )
        streaming = self._streaming(q, k, mask, scale, layer)
        return mask if len(set(streaming.dense)) == streaming.n_heads else mask.streamed(streaming)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskRows, scale: float, layer: int) -> Tensor:
        """The attention of one layer: `[batch query head d_head]`."""
        mask = mask if mask.streaming is not None else self.restrict(q, k, mask, scale, layer)
        if mask.streaming is None:
            seen = mask.full()[:, None]  # [batch 1 query key]
            z = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
            return torch.where(seen.any(-1, keepdim=True), z, 0).transpose(1, 2)
        bounds = mask.bounds()
        assert bounds is not None  # checked by `streamed`
        length = bounds.offset + q.shape[2]  # without the unused slots of a KV cache of fixed size
        how = {"scale": scale, "start": bounds.start, "end": bounds.end, "implementation": self.implementation}
        k, v = k[:, :, :length], v[:, :, :length]
        streaming = mask.streaming
        z = hybrid_attention(q, k, v, streaming.dense, sink=streaming.sink, window=streaming.window, **how)
        return z.transpose(1, 2)

    def streamed(self, q: Tensor, k: Tensor, mask: MaskRows, scale: float, layer: int) -> MaskRows:
        """As `restrict`, also where every head is dense."""
        return mask.streamed(self._streaming(q, k, mask, scale, layer))
