"""Compares outputs before anything is timed, at a short length: the attention of every layer and the last hidden state.

Layers are compared with a float32 softmax on the same q, k and v; the limit of the last hidden state, which covers
compiled blocks, follows from the error of eager attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hooked_mllm.attention.backends import implementation
from hooked_mllm.bench.compiled import CompiledBlocks
from hooked_mllm.bench.variants import Variant
from hooked_mllm.errors import NumericsError
from hooked_mllm.families.parts import decoder_sizes
from hooked_mllm.kernels.hybrid_attention import hybrid_attention
from hooked_mllm.kernels.implementations import Keys, Queries

WITNESS = "hooked_bench_witness"
#: the relative error allowed in one layer's attention, by dtype
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: allowed error of the last hidden state, as a multiple of eager attention's, or the limit above if that is larger
TIMES_EAGER = 3


@dataclass
class Witness:
    """Runs a variant's attention and its definition on the same inputs; the model uses the definition's result."""

    variant: Variant
    #: the relative error of each layer
    errors: list[float] = field(default_factory=list)

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The attention of one layer."""
        z, _ = implementation(module, self.variant.attention)(module, q, k, v, mask, **kwargs)
        layer: Any = module.layer_idx
        expected = self.defined(layer, q, k, v, kwargs["scaling"])
        self.errors.append(relative_error(z, expected))
        return expected.to(q.dtype), None

    def defined(
        self, layer: int, q: Queries, k: Keys, v: Keys, scale: float
    ) -> Float[Tensor, "batch query head d_head"]:
        """Causal attention, written out in float32, head by head."""
        variant, n_heads = self.variant, q.shape[1]
        key = torch.arange(q.shape[2], device=q.device)
        query = rearrange(key, "query -> query 1")
        causal = key <= query
        near = causal & ((key < variant.sink) | (key > query - variant.window))
        group = n_heads // k.shape[1]
        dense = range(n_heads) if variant.dense is None else variant.dense.by_layer.get(layer, ())
        z = []
        for head in range(n_heads):
            scores = q[:, head].float() @ k[:, head // group].float().transpose(1, 2) * scale  # [batch query key]
            seen = causal if head in dense else near
            z.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, head // group].float())
        return torch.stack(z, dim=2)


def largest_error(x: Queries, y: Queries, rows: int = 1024) -> float:
    """The largest relative error of x in any head of any chunk of `rows` queries, which shows a single wrong tile."""
    largest = 0.0
    for output, expected in zip(x.split(rows, dim=2), y.split(rows, dim=2), strict=True):
        expected = expected.double()
        errors = (output.double() - expected).norm(dim=(2, 3)) / expected.norm(dim=(2, 3))  # [batch head]
        largest = max(largest, float(errors.max()))
    return largest


def relative_error(x: Float[Tensor, "*axes"], y: Float[Tensor, "*axes"]) -> float:
    """The norm of the difference divided by the norm of y, in float64."""
    y = y.double()
    return float((x.double() - y).norm() / y.norm())


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of the token embeddings, where inputs go."""
    return next(model.get_input_embeddings().parameters()).device


def check_variants(
    model: PreTrainedModel, variants: Sequence[Variant], compiled: CompiledBlocks | None, length: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Compare every variant that computes attention with the definition; an error over the limit raises.

    `length` must exceed sink and window together, or streaming heads see every key. Returns the errors of each variant.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(input_device(model))
    layer_limit = LIMITS[model.dtype]
    eager = Variant("eager", "eager", "eager")
    model_limit = TIMES_EAGER * max(_errors(model, eager, None, tokens)[1], layer_limit)
    checks = []
    for variant in variants:
        if not variant.exact:
            continue
        in_layer, at_end = _errors(model, variant, compiled, tokens)
        errors = {"variant": variant.name, "length": length, "layer": in_layer, "last_hidden_state": at_end}
        checks.append({**errors, "limits": [layer_limit, model_limit]})
        compared = ("attention in some layer", in_layer, layer_limit), ("the last hidden state", at_end, model_limit)
        for what, error, limit in compared:
            if not error < limit:
                raise NumericsError(
                    f"{variant.title}: {what} differs from the definition by {error:.2g} at {length} tokens (relative; "
                    f"at most {limit:.2g} in {str(model.dtype).removeprefix('torch.')}), so nothing is timed."
                )
    return checks


def check_at_length(
    model: PreTrainedModel, variants: Sequence[Variant], length: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Compare hybrid attention at a timed length with one launch of the kernel, in the layer with most dense heads.

    Only on a GPU, where the op computes dense heads of long prompts by SDPA on separate CUDA streams.
    """
    device = input_device(model)
    hybrids = {v.attention: v for v in variants if v.dense is not None}
    if device.type != "cuda" or not hybrids:
        return []
    checks, limit = [], LIMITS[model.dtype]
    decoder = decoder_sizes(model.config)
    generator = torch.Generator(device).manual_seed(seed)
    n_kv = decoder.n_key_value_heads
    shapes = [(1, length, heads, decoder.d_head) for heads in (decoder.n_heads, n_kv, n_kv)]
    # [batch query head d_head] -> [batch head query d_head], with the strides of transformers' projections
    q, k, v = (torch.randn(s, generator=generator, device=device, dtype=model.dtype).transpose(1, 2) for s in shapes)
    for variant in hybrids.values():
        assert variant.dense is not None
        dense = max(variant.dense.by_layer.values(), key=len, default=())
        sizes: dict[str, Any] = {"sink": variant.sink, "window": variant.window}
        one_launch = hybrid_attention(q, k, v, dense, **sizes, implementation="triton")
        error = largest_error(hybrid_attention(q, k, v, dense, **sizes), one_launch)
        checks.append({"variant": variant.name, "length": length, "one_launch": error, "limits": [limit]})
        if not error < limit:
            raise NumericsError(
                f"{variant.title}: at {length} tokens, hybrid attention differs from one launch of its kernel by "
                f"{error:.2g} in some head and chunk of queries (relative; at most {limit:.2g}), so nothing is timed."
            )
    return checks


def _errors(
    model: PreTrainedModel, variant: Variant, compiled: CompiledBlocks | None, tokens: Int[Tensor, "1 pos"]
) -> tuple[float, float]:
    """The largest error in a layer, and that of the last hidden state."""
    witness = Witness(variant)
    _ACTIVE.append(witness)
    try:
        with replace(variant, attention=WITNESS, compiled=False).on(model):
            expected = model(input_ids=tokens, use_cache=False).last_hidden_state
    finally:
        _ACTIVE.pop()
    with variant.on(model, compiled):
        got = model(input_ids=tokens, use_cache=False).last_hidden_state
    return max(witness.errors), relative_error(got, expected)


#: the active witnesses, the innermost last
_ACTIVE: list[Witness] = []


def _witness_mask(**arguments: Any) -> Any:
    """The mask of the variant's own attention."""
    build: Any = ALL_MASK_ATTENTION_FUNCTIONS.get(_ACTIVE[-1].variant.attention)
    return None if build is None else build(**arguments)


AttentionInterface.register(WITNESS, lambda *args, **kwargs: _ACTIVE[-1](*args, **kwargs))
AttentionMaskInterface.register(WITNESS, _witness_mask)
