"""Text decoders of published sizes with random weights: what a forward pass costs does not depend on the weights."""

from typing import Any

import torch

from hooked_mllm.bench.choices import SIZES, TextSize
from hooked_mllm.errors import InputError, nearest


def random_text_model(
    size: str | TextSize,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    device_map: str | None = None,
    seed: int = 0,
) -> Any:
    """A transformers text decoder of a published size with random weights, made where they stay.

    Args:
        size: A name of `SIZES`, or a size of your own.
        dtype: Of the weights.
        device: Where the model is made.
        device_map: "auto" or "balanced": spread the layers over all GPUs instead (needs `accelerate`).
        seed: Of the weights.

    Raises:
        InputError: for an unknown name.

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
    places: dict[str, Any] = {"": device} if device_map is None else _spread(model, dtype)
    for name, place in places.items():
        model.get_submodule(name).to_empty(device=place)
    for name, parameter in model.named_parameters():
        generator = torch.Generator(parameter.device).manual_seed(seed)
        seed += 1
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    place = places["rotary_emb" if "rotary_emb" in places else ""]
    model.rotary_emb = type(model.rotary_emb)(model.config).to(place)  # its buffers are no weights
    model = model.eval().requires_grad_(False)
    if device_map is not None:
        from accelerate import dispatch_model

        model = dispatch_model(model, device_map=places)
    return model


def _spread(model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Which device each part goes to: layers whole, weights even."""
    try:
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory
    except ImportError as error:
        raise InputError("--device-map needs accelerate: pip install 'hooked-mllm[accelerate]'") from error
    whole: list[str] = list(model._no_split_modules or ())
    memory = get_balanced_memory(model, dtype=dtype, no_split_module_classes=whole)
    places = dict(infer_auto_device_map(model, max_memory=memory, dtype=dtype, no_split_module_classes=whole))
    if "disk" in places.values() or ("cpu" in places.values() and torch.cuda.is_available()):
        raise InputError("The weights do not fit the GPUs that are here.")
    return places
