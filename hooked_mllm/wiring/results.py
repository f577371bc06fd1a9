"""What each head writes to the residual stream, and other linear maps, read from what a module does.

Parameters are read only where they are the whole function of the module: an adapter, a quantised or an offloaded module
is called.
"""

from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_mllm.errors import HookValueError

#: elements of the input of one call of a module for several heads
CALL_SIZE = 2**26
ADVICE = "Make the adapter a part of the weights (`merge_and_unload` of peft), or load the model unquantised"


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes, also where its weights are offloaded to the CPU or to disk."""
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)  # accelerate's; several are in a SequentialHook
        for each in getattr(hook, "hooks", (hook,)):
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.device(device)
        weight = next(part.parameters(recurse=False), None)
        if weight is not None and not weight.is_meta:
            return weight.device
    return torch.device("cpu")


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a Linear that computes with its own weight, which is in memory and not packed."""
    if type(module) is not nn.Linear or ("forward" in vars(module) and not hasattr(module, "_hf_hook")):
        return False
    weight = module.weight
    return type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta


def active_dropout(module: nn.Module) -> str | None:
    """The path of a dropout that is active in a module; None without one."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    named = module.named_modules()
    return next((name for name, part in named if isinstance(part, kinds) and part.training and part.p), None)


def state_of(module: nn.Module) -> tuple[Any, ...]:
    """What differs where a module was changed: which adapters are active and merged, and versions of parameters."""
    names = ("active_adapters", "merged_adapters", "scaling", "disable_adapters")
    adapted = [part for part in module.modules() if hasattr(part, "disable_adapters")]
    adapters = (repr(getattr(part, name, None)) for part in adapted for name in names)
    held = (p for p in module.parameters() if p.is_floating_point() and not p.is_meta and not p.is_inference())
    return (*adapters, *((parameter._version, parameter.data_ptr()) for parameter in held))


def call(module: nn.Module, x: Float[Tensor, "*axes d_in"]) -> Float[Tensor, "*axes d_out"]:
    """What a module returns for `x`, on its own device, without the torch hooks that are registered on it.

    Raises:
        HookValueError: If it draws random numbers, so that two calls differ.
    """
    if (dropout := active_dropout(module)) is not None:
        raise HookValueError(
            f"What a {type(module).__name__} does to each head is not defined while its dropout {dropout!r} is active, "
            "as in training mode: call `model.hf_model.eval()`, or make the adapter a part of the weights with "
            "`merge_and_unload`."
        )
    return module.forward(x.to(device_of(module)))


def value_at_zero(module: nn.Module, like: Float[Tensor, "*axes d_in"]) -> Float[Tensor, " d_out"] | None:
    """What a projection returns at zero: its bias; None without one. `like` is an input, whose dtype and width it has.

    Raises:
        HookValueError: See `call`.
    """
    if is_plain(module):
        return module.bias  # type: ignore[return-value]
    value = call(module, like.new_zeros(1, 1, like.shape[-1]))[0, 0]
    return value if bool(value.any()) else None


def head_results(
    z: Float[Tensor, "batch pos head d_head"],
    o_proj: nn.Module,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch pos head d_model"]:
    """What each head writes to the residual stream: the projection of its z alone, minus that of zeros.

    `z_h W_O[h]` where the projection is a plain Linear; another module is called with all other heads at zero.

    Args:
        z: The mixed values of each head.
        o_proj: The output projection.
        device: Where the results are returned; None for the device of `z`.
        dtype: Their dtype; None for that of `z`.

    Raises:
        HookValueError: If the projection has an active dropout.
    """
    device, dtype = device or z.device, dtype or z.dtype
    if not is_plain(o_proj):
        return _called(z, o_proj).to(device, dtype)
    weight: Tensor = o_proj.weight  # type: ignore[assignment]
    weight = rearrange(weight, "d_model (head d_head) -> d_model head d_head", head=z.shape[-2]).to(device, dtype)
    return einsum(z.to(dtype=dtype), weight, "batch pos head d_head, d_model head d_head -> batch pos head d_model")


def _called(z: Float[Tensor, "batch pos head d_head"], o_proj: nn.Module) -> Float[Tensor, "batch pos head d_model"]:
    heads = torch.arange(z.shape[-2], device=z.device)
    zero = value_at_zero(o_proj, z.flatten(-2))
    results = []
    for selected in heads.split(max(1, CALL_SIZE // max(1, z.numel()))):
        mask = selected[:, None] == heads  # [row head]
        alone = torch.where(mask[:, None, None, :, None], z, 0)  # [row batch pos head d_head], one head in each row
        written = call(o_proj, rearrange(alone, "row batch pos head d_head -> (row batch) pos (head d_head)"))
        written = written if zero is None else written - zero
        results.append(rearrange(written, "(row batch) pos d_model -> batch pos row d_model", row=len(selected)))
    return torch.cat(results, dim=2)


@torch.no_grad()
def effective_weight(
    module: nn.Module, d_in: int, dtype: torch.dtype, outputs: Int[Tensor, " output"] | None = None
) -> Float[Tensor, "output d_in"]:
    """The weight of a linear map, from what it does to unit vectors; of a plain Linear, its parameter.

    Args:
        module: The linear map.
        d_in: Its input width.
        dtype: The dtype of its inputs.
        outputs: The outputs whose rows are returned; None for all.

    Raises:
        HookValueError: See `call`.
    """
    if is_plain(module):
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight if outputs is None else weight[outputs.to(weight.device)]
    units = torch.eye(d_in, dtype=dtype, device=device_of(module))
    zero = value_at_zero(module, units)
    columns = []
    for part in units.split(256):
        column = call(module, part[None])[0]  # [unit d_out]
        column = column if zero is None else column - zero
        columns.append(column if outputs is None else column[:, outputs.to(column.device)])
    return torch.cat(columns).T  # [d_in output] -> [output d_in]
