"""Text decoders of published sizes with random weights, on which the time of a forward pass does not depend."""

from typing import TYPE_CHECKING, Literal, cast

import torch
from transformers import PreTrainedModel

from hooked_mllm.bench.choices import SIZES, TextSize
from hooked_mllm.errors import InputError, nearest

#: the device of each module, by name
Devices = dict[str, str | int | torch.device]
if TYPE_CHECKING:
    #: how accelerate spreads layers over GPUs
    DeviceMap = Literal["auto", "balanced"]
else:  # at run time a plain string, checked by the command line
    DeviceMap = str


def random_text_model(
    size: str | TextSize, *, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu",
    device_map: DeviceMap | None = None, seed: int = 0,
) -> PreTrainedModel:  # fmt: skip
    """A transformers text decoder of a published size with random weights, which are initialized on their device.

    Args:
        size: A name of `SIZES` (others raise an `InputError`), or a custom size.
        dtype: Dtype of the weights.
        device: Device of the weights.
        device_map: "auto" or "balanced": spread the layers over all GPUs instead (needs `accelerate`).
        seed: Seed of the weights.

    Examples:
        >>> model = random_text_model("tiny", dtype=torch.float32)
        >>> model.config.num_hidden_layers, model.config.num_attention_heads
        (3, 4)
    """
    if isinstance(size, str):
        if size not in SIZES:
            raise InputError(f"No size {size!r}; expected one of {', '.join(SIZES)}. {nearest(size, SIZES)}".rstrip())
        size = SIZES[size]
    model = size.empty(dtype)
    devices: Devices = {"": device} if device_map is None else _balanced_devices(model, dtype)
    for name, module_device in devices.items():
        model.get_submodule(name).to_empty(device=module_device)
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(seed)
        seed += 1
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    # the buffers of the rotary encoding are computed, not drawn
    model.rotary_emb = type(model.rotary_emb)(model.config).to(devices["rotary_emb" if "rotary_emb" in devices else ""])
    model = model.eval().requires_grad_(False)
    if device_map is not None:
        from accelerate import dispatch_model

        model = cast(PreTrainedModel, dispatch_model(model, device_map=devices))
    return model


def _balanced_devices(model: PreTrainedModel, dtype: torch.dtype) -> Devices:
    """The device of each module: whole layers, with weights spread evenly."""
    try:
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError as error:
        raise InputError("--device-map needs accelerate: pip install 'hooked-mllm[accelerate]'") from error
    whole: list[str] = list(model._no_split_modules or ())
    memory = get_balanced_memory(model, dtype=dtype, no_split_module_classes=whole)
    devices = dict(infer_auto_device_map(model, max_memory=memory, dtype=dtype, no_split_module_classes=whole))
    if "disk" in devices.values() or ("cpu" in devices.values() and torch.cuda.is_available()):
        raise InputError("The weights do not fit into the memory of the available GPUs.")
    return devices
