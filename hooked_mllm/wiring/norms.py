"""`hook_scale` and `hook_normalized` of RMSNorm and LayerNorm, in TransformerLens's names."""

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mllm.hooks.module_hook import Call
from hooked_mllm.hooks.table import Side
from hooked_mllm.wiring.access import Access, add_batch_axis, remove_batch_axis
from hooked_mllm.wiring.results import call, device_of


class RMSNorm(Protocol):
    """An RMSNorm of transformers."""

    variance_epsilon: float
    weight: Tensor


Wide = Float[Tensor, "*axes d_model"]
Scale = Float[Tensor, "*axes 1"]


def core_of(norm: nn.Module) -> nn.Module:
    """The norm inside of an adapter; a norm without one is itself."""
    parts = norm.modules()
    return next((m for m in parts if isinstance(m, nn.LayerNorm) or hasattr(m, "variance_epsilon")), norm)


def gain_and_bias(norm: nn.Module, dtype: torch.dtype, width: int) -> tuple[Tensor | None, Tensor | None]:
    """Gain and bias `[d_model]` of a norm; of an adapted or offloaded one, from what it does to a vector of +-1."""
    core = core_of(norm)
    if core is norm and not any(parameter.is_meta for parameter in norm.parameters()):
        return cast(RMSNorm, norm).weight, getattr(norm, "bias", None)
    signs = 1 - 2 * (torch.arange(width, dtype=dtype, device=device_of(norm)) % 2)  # mean 0, mean of squares 1
    bias = call(norm, torch.zeros_like(signs)[None, None])[0, 0]
    gain = (call(norm, signs[None, None])[0, 0] - bias) * signs
    return gain * (1 + epsilon_of(norm)) ** 0.5, bias if isinstance(core, nn.LayerNorm) else None


def epsilon_of(norm: nn.Module) -> float:
    """What a norm adds to the mean of squares."""
    core = core_of(norm)
    return core.eps if isinstance(core, nn.LayerNorm) else cast(RMSNorm, core).variance_epsilon


def centred(norm: nn.Module, x: Wide) -> Wide:
    """The input in float32; of a LayerNorm, minus its mean."""
    x = x.float()
    return x - x.mean(-1, keepdim=True) if isinstance(core_of(norm), nn.LayerNorm) else x


def scale_of(norm: nn.Module, x: Wide) -> Scale:
    r"""$\sqrt{\overline{x^2} + \epsilon}$ of the centred input, in float32."""
    return torch.sqrt(centred(norm, x).pow(2).mean(-1, keepdim=True) + epsilon_of(norm))  # [*axes d_model] -> [*axes 1]


def affine(norm: nn.Module, normalized: Wide) -> Wide:
    """The normalised input times the norm's gain, plus its bias, in the input's dtype."""
    gain, bias = gain_and_bias(norm, normalized.dtype, normalized.shape[-1])
    if isinstance(core_of(norm), nn.LayerNorm):
        out = normalized.float()
        if gain is not None:
            out = out * gain.float()
        if bias is not None:
            out = out + bias.float()
        return out.to(normalized.dtype)
    assert gain is not None  # an RMSNorm has one
    return gain * normalized


def normalized_of(call: Call) -> Wide:
    """The input of a norm divided by its scale (the one that a hook saw, where one did), in the input's dtype."""
    x = call.first()
    scale = call.state["scale"] if "scale" in call.state else scale_of(call.module, x)
    return (centred(call.module, x) / scale).to(x.dtype)


@dataclass(frozen=True)
class NormScale(Access):
    """`hook_scale`: what the norm at `path` divides by."""

    path: str
    packed: bool
    side: Side = "output"

    def get(self, call: Call) -> Float[Tensor, "batch pos 1"]:
        scale = call.state["scale"] = scale_of(call.module, call.first())
        return add_batch_axis(scale, self.packed)

    def put(self, call: Call, value: Float[Tensor, "batch pos 1"]) -> None:
        call.state["scale"] = remove_batch_axis(value, self.packed)
        call.set_main(affine(call.module, normalized_of(call)))


class NormInput(NormScale):
    """`hook_normalized`: the input of the norm divided by its scale, before gain and bias (`attn.hook_in`: after)."""

    def get(self, call: Call) -> Float[Tensor, "batch pos d_model"]:
        return add_batch_axis(normalized_of(call), self.packed)

    def put(self, call: Call, value: Float[Tensor, "batch pos d_model"]) -> None:
        call.set_main(affine(call.module, remove_batch_axis(value, self.packed)))


#: the accesses of a norm, by the short name of their hook points
NORM_POINTS: dict[str, type[NormScale]] = {"scale": NormScale, "normalized": NormInput}
