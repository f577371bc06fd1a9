"""What each head writes to the residual stream."""

from typing import cast

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn


def head_results(
    z: Float[Tensor, "batch pos head d_head"], o_proj: nn.Module, device: torch.device | str | None = None
) -> Float[Tensor, "batch pos head d_model"]:
    """What each head writes to the residual stream, `z_h W_O[h]`.

    Args:
        z: The mixed values of each head.
        o_proj: The output projection, a linear module.
        device: Where to compute; None for the device of `z`.
    """
    weight = cast(Tensor, o_proj.weight)
    weight = rearrange(weight, "d_model (head d_head) -> d_model head d_head", head=z.shape[-2])
    weight = weight.to(device or z.device, z.dtype)
    return einsum(z, weight, "batch pos head d_head, d_model head d_head -> batch pos head d_model")
