"""`hook_scale` and `hook_normalized` of RMSNorm and LayerNorm, in TransformerLens's names."""

from collections.abc import Callable
from typing import Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mllm.hooks.module_hook import Call


class RMSNorm(Protocol):
    """An RMSNorm of transformers."""

    variance_epsilon: float
    weight: Tensor


Wide = Float[Tensor, "*axes d_model"]
Scale = Float[Tensor, "*axes 1"]


def centred(norm: nn.Module, x: Wide) -> Wide:
    """The input in float32; of a LayerNorm, minus its mean."""
    x = x.float()
    return x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x


def scale_of(norm: nn.Module, x: Wide) -> Scale:
    r"""$\sqrt{\overline{x^2} + \epsilon}$ of the centred input, in float32."""
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else cast(RMSNorm, norm).variance_epsilon
    return torch.sqrt(centred(norm, x).pow(2).mean(-1, keepdim=True) + eps)  # [*axes d_model] -> [*axes 1]


def affine(norm: nn.Module, normalized: Wide) -> Wide:
    """The normalised input times the norm's gain, plus its bias, in the input's dtype."""
    if isinstance(norm, nn.LayerNorm):
        out = normalized.float()
        if norm.weight is not None:
            out = out * norm.weight.float()
        if norm.bias is not None:
            out = out + norm.bias.float()
        return out.to(normalized.dtype)
    return cast(RMSNorm, norm).weight * normalized


def get_scale(call: Call) -> Scale:
    """`hook_scale` of one call of a norm."""
    scale = call.state["scale"] = scale_of(call.module, call.first())
    return scale


def put_scale(call: Call, scale: Scale) -> None:
    """Let the norm divide by `scale`."""
    call.state["scale"] = scale
    put_normalized(call, get_normalized(call))


def get_normalized(call: Call) -> Wide:
    """`hook_normalized` of one call of a norm: the input divided by its scale, in the input's dtype."""
    x = call.first()
    scale = call.state.get("scale")
    scale = scale_of(call.module, x) if scale is None else scale
    return (centred(call.module, x) / scale).to(x.dtype)


def put_normalized(call: Call, normalized: Wide) -> None:
    """Let the norm apply its gain to `normalized`."""
    call.set_main(affine(call.module, normalized))


#: getter and setter by short name
READ_WRITE: dict[str, tuple[Callable[[Call], Tensor], Callable[[Call, Tensor], None]]] = {
    "scale": (get_scale, put_scale),
    "normalized": (get_normalized, put_normalized),
}
