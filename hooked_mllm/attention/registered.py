"""Hybrid attention under a plain name, for any decoder of transformers."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hooked_mllm.attention.backends import PREFIX, slim_mask
from hooked_mllm.attention.hybrid import HybridAttention, RoutingPolicy
from hooked_mllm.attention.masks import MaskRows, call_sizes
from hooked_mllm.checks import checked
from hooked_mllm.errors import HeadError, HookValueError, UnsupportedModelError
from hooked_mllm.heads import HeadsLike
from hooked_mllm.kernels.hybrid_attention.op import as_autocast, gradients
from hooked_mllm.kernels.implementations import Implementation
from hooked_mllm.kernels.streaming_window import WholeNumber


@dataclass(frozen=True)
class RegisteredAttention:
    """The function that transformers calls for a registered name."""

    name: str
    hybrid: HybridAttention
    checked: set[tuple[int, int]] = field(default_factory=set, compare=False, repr=False)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, dropout: float = 0.0, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Z `[batch query head d_head]` of q, k, v `[batch head pos d_head]`, and no weights."""
        _check(self.name, module, query.shape[-1], value.shape[-1], dropout, kwargs)
        if query.shape[2] == 1 or kwargs.get("sliding_window") is not None:
            sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = as_autocast(query, key, value)
        layer: Any = module.layer_idx
        shape = shape_of(module)
        if torch.compiler.is_compiling():
            z = _op(query, key, value, attention_mask, self.name, layer, scale, [*shape])
            return z.transpose(1, 2), None
        self.check_heads(query, *shape)
        return self.run(query, key, value, attention_mask, layer, scale), None

    def check_heads(self, query: Tensor, n_layers: int, n_heads: int) -> None:
        """Check the dense heads against a model of this shape, 0 where it is unknown, once for each shape."""
        if n_heads and n_heads != query.shape[1]:
            raise HeadError(
                f"Attention has {query.shape[1]} heads in this process and {n_heads} in the whole model: heads that "
                "are spread over processes have other numbers. Spread the layers instead (device_map)."
            )
        shape = (n_layers, query.shape[1])
        if n_layers and shape not in self.checked:
            self.hybrid.validate(*shape, causal=True)
            self.checked.add(shape)

    def run(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, layer: int, scale: float) -> Tensor:
        """The attention of one layer, under a mask `[batch key]` of real keys or none: `[batch query head d_head]`."""
        return self.hybrid(q, k, v, self._mask(q, k, padding, layer, scale), scale, layer)

    def _mask(self, q: Tensor, k: Tensor, padding: Tensor | None, layer: int, scale: float) -> MaskRows:
        mask = MaskRows.of(padding, **call_sizes(q, k), causal=True, upper_left=True)
        return self.hybrid.streamed(q, k, mask, scale, layer)

    def gradients(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, dz: Tensor, layer: int, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of `run`: autograd records nothing within an op."""
        mask = self._mask(q, k, padding, layer, scale)
        bounds, streaming = mask.bounds(), mask.streaming
        assert bounds is not None and streaming is not None  # checked by `streamed`
        length = bounds.offset + q.shape[2]
        how = [*streaming.dense], streaming.sink, streaming.window, scale, bounds.start, bounds.end
        grads = gradients(q, k[:, :, :length], v[:, :, :length], *how, dz)
        unread = (0, 0, 0, k.shape[2] - length)  # unused slots at the end of a cache of fixed size
        return grads[0], pad(grads[1], unread), pad(grads[2], unread)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """The numbers of layers and heads of an attention module's model, 0 where its config has none."""
    config: Any = getattr(module, "config", None)
    return getattr(config, "num_hidden_layers", None) or 0, getattr(config, "num_attention_heads", None) or 0


#: by name
REGISTERED: dict[str, RegisteredAttention] = {}


@checked
def register_hybrid_attention(
    name: str, heads: HeadsLike | RoutingPolicy, *, sink: WholeNumber = 64, window: WholeNumber = 1024,
    implementation: Implementation = "auto",
) -> None:  # fmt: skip
    """Register hybrid attention as an attention implementation of transformers, for any of its decoders.

    Use it as any other: `model.set_attn_implementation(name)`, or `attn_implementation=name` when a model is loaded;
    of a multimodal model only for the language model, `{"text_config": name}`. Prefill is hybrid, decoding dense, and
    layers with a sliding window keep SDPA. A name that is registered again has the new settings in all models.

    Args:
        name: The name; not one of transformers' own, and without "flash", "|" or "/".
        heads: As of `HybridAttention`; checked against a model when it first runs.
        sink: First tokens that the other heads see.
        window: Last tokens that they see, the query's own included.
        implementation: "auto", "triton" or "naive", as in `hybrid_attention`.

    Raises:
        HookValueError: For a name that is taken or invalid.
        HeadError, InputError: For invalid heads or sizes; in a run, for heads that the model lacks.
        UnsupportedModelError: In a run, for attention that is not causal, or depends on more than q, k, v and padding.

    Source: arXiv:2606.05843, algorithm 3.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> register_hybrid_attention("hybrid", ["L0H1"], sink=2, window=8, implementation="naive")
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
        >>> config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        >>> model = LlamaForCausalLM._from_config(config, attn_implementation="hybrid")
        >>> model(torch.arange(20)[None]).logits.shape
        torch.Size([1, 20, 64])
    """
    if not isinstance(name, str) or not name or any(part in name for part in ("flash", "|", "/", PREFIX)):
        raise HookValueError(
            f"{name!r} cannot name an attention implementation: transformers gives names with 'flash', '|' or '/' a "
            "meaning of their own."
        )
    if name not in REGISTERED and (name == "eager" or name in ALL_ATTENTION_FUNCTIONS):
        raise HookValueError(f"transformers has an attention implementation {name!r} of its own: take another name.")
    hybrid = HybridAttention(heads, sink=sink, window=window, implementation=implementation)
    REGISTERED[name] = RegisteredAttention(name, hybrid)
    AttentionInterface.register(name, REGISTERED[name])
    AttentionMaskInterface.register(name, slim_mask("sdpa"))


def _check(name: str, module: nn.Module, d_head: int, d_value: int, dropout: float, kwargs: dict[str, Any]) -> None:
    what = f"{type(module).__name__} under attn_implementation={name!r}"
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal:
        raise UnsupportedModelError(
            f"{what}: hybrid attention is causal and this module is not. Use 'sdpa' there; of a multimodal model, "
            f"set_attn_implementation({{'text_config': {name!r}}})."
        )
    if dropout:
        raise UnsupportedModelError(f"{what}: no dropout of attention here (got {dropout}): call model.eval().")
    for more in ("softcap", "s_aux", "position_bias", "cache"):  # attention beyond softmax(q k) v
        if kwargs.get(more) is not None:
            raise UnsupportedModelError(
                f"{what}: the model passes `{more}`, which this has not. Use 'sdpa' or 'eager'."
            )
    if not hasattr(module, "layer_idx"):
        raise UnsupportedModelError(f"{what}: the module has no `layer_idx`, so its heads are not known. Use 'sdpa'.")
    if d_value != d_head:
        widths = f"values of width {d_value} and queries of width {d_head}"
        raise UnsupportedModelError(f"{what} has {widths}: latent attention is not done here. Use 'sdpa'.")


@torch.library.custom_op("hooked_mllm::registered_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _op(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, name: str, layer: int, scale: float, shape: list[int]
) -> Tensor:
    """Registered attention as one op: a compiled graph contains its name, not the heads. `shape`: as of `shape_of`."""
    REGISTERED[name].check_heads(q, *shape)
    z = REGISTERED[name].run(q, k, v, padding, layer, scale)
    return z.contiguous().transpose(1, 2)


@_op.register_fake
def _(q, k, v, padding, name, layer, scale, shape):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, padding, *ctx.settings, _ = inputs
    ctx.save_for_backward(q, k, v, padding)


@torch.library.custom_op(
    "hooked_mllm::registered_attention_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _gradients(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, dz: Tensor, name: str, layer: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return REGISTERED[name].gradients(q, k, v, padding, dz, layer, scale)


@_gradients.register_fake
def _(q, k, v, padding, dz, name, layer, scale):
    return torch.empty_like(q), k.new_empty(k.shape), v.new_empty(v.shape)


def _backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
    q, k, v, padding = ctx.saved_tensors
    return (*_gradients(q, k, v, padding, dz, *ctx.settings), *[None] * 5)


_op.register_autograd(_backward, setup_context=_setup)
