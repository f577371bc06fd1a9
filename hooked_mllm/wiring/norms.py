"""`hook_scale` and `hook_normalized` of RMSNorm and LayerNorm, as TransformerLens names them."""

from typing import Any

import torch
from torch import Tensor, nn

from hooked_mllm.hooks.module_hook import Call


def centred(norm: Any, x: Tensor) -> Tensor:
    """The input in float32, less its mean for a LayerNorm."""
    x = x.float()
    return x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x


def scale_of(norm: Any, x: Tensor) -> Tensor:
    r"""$\sqrt{\overline{x^2} + \epsilon}$ of the centred input: `[... 1]`, float32."""
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    return torch.sqrt(centred(norm, x).pow(2).mean(-1, keepdim=True) + eps)


def affine(norm: Any, normalized: Tensor) -> Tensor:
    """The norm's gain (and bias) on a normalised input, in its dtype."""
    if isinstance(norm, nn.LayerNorm):
        out = normalized.float()
        if norm.weight is not None:
            out = out * norm.weight.float()
        if norm.bias is not None:
            out = out + norm.bias.float()
        return out.to(normalized.dtype)
    return norm.weight * normalized


def get_scale(call: Call) -> Tensor:
    """`hook_scale` of a norm's call."""
    scale = call.state["scale"] = scale_of(call.module, call.first())
    return scale


def put_scale(call: Call, scale: Tensor) -> None:
    """Make a norm divide by `scale`."""
    call.state["scale"] = scale
    put_normalized(call, get_normalized(call))


def get_normalized(call: Call) -> Tensor:
    """`hook_normalized` of a norm's call: the input divided by its scale, in the input's dtype."""
    x = call.first()
    scale = call.state.get("scale")
    scale = scale_of(call.module, x) if scale is None else scale
    return (centred(call.module, x) / scale).to(x.dtype)


def put_normalized(call: Call, normalized: Tensor) -> None:
    """Make a norm apply its gain to `normalized`."""
    call.set_main(affine(call.module, normalized))
