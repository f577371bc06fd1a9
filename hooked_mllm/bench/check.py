"""Outputs are compared before anything is timed.

Two comparisons at a short length. In every layer, the variant's attention against softmax written out in float32, on
the same q, k and v, so that errors cannot hide behind the layers or grow through them. And the model's last hidden
state against that of the model run on the written-out attention, which also covers compiled blocks. There, rounding
adds up over layers, so transformers' eager attention says how much of it is usual.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hooked_mllm.attention.backends import implementation
from hooked_mllm.bench.compiled import CompiledBlocks
from hooked_mllm.bench.variants import Variant
from hooked_mllm.errors import NumericsError
from hooked_mllm.kernels.hybrid_attention import hybrid_attention

WITNESS = "hooked_bench_witness"
#: the relative error allowed in one layer's attention, by dtype
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: that of the last hidden state: times what transformers' eager attention has, or times the limit above if that is more
TIMES_EAGER = 3


@dataclass
class Witness:
    """Runs an attention implementation beside its definition, and goes on with the definition's result."""

    variant: Variant
    errors: list[float] = field(default_factory=list)

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        """The attention of one layer."""
        z, _ = implementation(module, self.variant.attention)(module, q, k, v, mask, **kwargs)
        layer: Any = module.layer_idx
        want = self.defined(layer, q, k, v, kwargs["scaling"])
        self.errors.append(relative_error(z, want))
        return want.to(q.dtype), None

    def defined(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Causal attention, written out: `[batch query head d_head]`, float32."""
        variant, n = self.variant, q.shape[2]
        j, i = torch.arange(n, device=q.device), torch.arange(n, device=q.device)[:, None]
        causal = j <= i
        near = causal & ((j < variant.sink) | (j > i - variant.window))
        group = q.shape[1] // k.shape[1]
        dense = range(q.shape[1]) if variant.dense is None else variant.dense.by_layer.get(layer, ())
        out = torch.empty(q.shape[0], n, q.shape[1], v.shape[3], dtype=torch.float32, device=q.device)
        for head in range(q.shape[1]):
            scores = q[:, head].float() @ k[:, head // group].float().transpose(1, 2) * scale
            seen = causal if head in dense else near
            out[:, :, head] = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, head // group].float()
        return out


def largest_error(x: Tensor, y: Tensor, rows: int = 1024) -> float:
    """The largest relative error of any head in any run of queries: a wrong tile is not lost among right ones.

    Args:
        x: `[batch head query d_head]`.
        y: What it should be, likewise.
        rows: Queries in a run.
    """
    worst = 0.0
    for a, b in zip(x.split(rows, dim=2), y.split(rows, dim=2), strict=True):
        b = b.double()
        worst = max(worst, float(((a.double() - b).norm(dim=(2, 3)) / b.norm(dim=(2, 3))).max()))
    return worst


def relative_error(x: Tensor, y: Tensor) -> float:
    """The norm of the difference over that of y, in float64."""
    y = y.double()
    return float((x.double() - y).norm() / y.norm())


def check_variants(
    model: Any, variants: Sequence[Variant], compiled: CompiledBlocks | None, length: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Compare every variant that computes attention with the definition.

    Args:
        model: A text decoder.
        variants: The ways to run it.
        compiled: Its compiled blocks, for those variants that run them.
        length: Tokens; longer than sink and window together, or no key is hidden from a streaming head.
        seed: Of the token ids.

    Returns:
        What was compared: for each variant, its largest error in a layer and that of the last hidden state.

    Raises:
        NumericsError: if one of them is wrong.
    """
    place = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(place)
    layer_limit = LIMITS[model.dtype]
    eager = Variant("eager", "eager", "eager")
    model_limit = TIMES_EAGER * max(_errors(model, eager, None, tokens)[1], layer_limit)
    found = []
    for variant in variants:
        if not variant.exact:
            continue
        in_layer, at_end = _errors(model, variant, compiled, tokens)
        row = {"variant": variant.name, "length": length, "layer": in_layer, "last_hidden_state": at_end}
        found.append({**row, "limits": [layer_limit, model_limit]})
        for what, error, limit in (
            ("attention in some layer", in_layer, layer_limit),
            ("the last hidden state", at_end, model_limit),
        ):
            if not error < limit:
                raise NumericsError(
                    f"{variant.title}: {what} differs from the definition by {error:.2g} at {length} tokens (relative; "
                    f"at most {limit:.2g} in {str(model.dtype).removeprefix('torch.')}), so nothing is timed."
                )
    return found


def check_at_length(model: Any, variants: Sequence[Variant], length: int, seed: int = 0) -> list[dict[str, Any]]:
    """Compare hybrid attention at a timed length with one launch of the kernel, which was compared at the short one.

    Long prompts take another way through the op, dense heads by SDPA on streams of their own. One layer of each
    variant, that with most dense heads, on random q, k and v. On a GPU; elsewhere all lengths go one way.

    Raises:
        NumericsError: if they differ.
    """
    config, found = model.config, []
    place = model.get_input_embeddings().weight.device
    hybrids = {v.attention: v for v in variants if v.dense is not None}
    if place.type != "cuda" or not hybrids:
        return found
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    generator = torch.Generator(place).manual_seed(seed)
    shapes = [(1, length, heads, width) for heads in (n_heads, n_kv, n_kv)]
    q, k, v = (torch.randn(s, generator=generator, device=place, dtype=model.dtype).transpose(1, 2) for s in shapes)
    for variant in hybrids.values():
        assert variant.dense is not None
        dense = max(variant.dense.by_layer.values(), key=len, default=())
        sizes: dict[str, Any] = {"sink": variant.sink, "window": variant.window}
        error = largest_error(
            hybrid_attention(q, k, v, dense, **sizes),
            hybrid_attention(q, k, v, dense, **sizes, implementation="triton"),
        )
        limit = LIMITS[model.dtype]
        found.append({"variant": variant.name, "length": length, "one_launch": error, "limits": [limit]})
        if not error < limit:
            raise NumericsError(
                f"{variant.title}: at {length} tokens, hybrid attention differs from one launch of its kernel by "
                f"{error:.2g} in some head and place (relative; at most {limit:.2g}), so nothing is timed there."
            )
    return found


def _errors(model: Any, variant: Variant, compiled: CompiledBlocks | None, tokens: Tensor) -> tuple[float, float]:
    """The largest error in a layer, and that of the last hidden state."""
    witness = Witness(variant)
    with _running(witness) as name, replace(variant, attention=name, compiled=False).on(model):
        want = model(input_ids=tokens, use_cache=False).last_hidden_state
    with variant.on(model, compiled):
        got = model(input_ids=tokens, use_cache=False).last_hidden_state
    return max(witness.errors), relative_error(got, want)


_CURRENT: list[Witness] = []


@contextmanager
def _running(witness: Witness) -> Any:
    _CURRENT.append(witness)
    try:
        yield WITNESS
    finally:
        _CURRENT.pop()


def _witness(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _CURRENT[-1](module, *args, **kwargs)


def _witness_mask(**arguments: Any) -> Any:
    build: Any = ALL_MASK_ATTENTION_FUNCTIONS.get(_CURRENT[-1].variant.attention)
    return None if build is None else build(**arguments)


AttentionInterface.register(WITNESS, _witness)
AttentionMaskInterface.register(WITNESS, _witness_mask)
