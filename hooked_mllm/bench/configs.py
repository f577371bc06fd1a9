"""Text decoders of published sizes with random weights: what a forward pass costs does not depend on the weights."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import (
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
)

from hooked_mllm.errors import InputError, nearest

_CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen3_vl": (Qwen3VLTextConfig, Qwen3VLTextModel),
    "qwen3": (Qwen3Config, Qwen3Model),
    "qwen2": (Qwen2Config, Qwen2Model),
}


@dataclass(frozen=True)
class TextSize:
    """The shape of one text decoder.

    Attributes:
        kind: Its transformers class: the text model of Qwen3-VL, Qwen3 (InternVL3.5) or Qwen2 (LLaVA-OneVision).
        dense: Numbers of dense heads to try: table 2 of the paper, where it has this model.
    """

    kind: Literal["qwen3_vl", "qwen3", "qwen2"]
    layers: int
    heads: int
    kv_heads: int
    d_head: int
    hidden: int
    mlp: int
    vocabulary: int
    dense: tuple[int, ...]

    def config(self) -> Any:
        """The transformers configuration."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
        more: dict[str, Any] = {"head_dim": self.d_head}
        if self.kind == "qwen2":
            more = {}  # d_head is hidden / heads there
        if self.kind == "qwen3_vl":
            half = self.d_head // 2
            side = half * 20 // 64
            sections = [half - 2 * side, side, side]  # 24, 20, 20 of 64
            rope = {**rope, "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
        return _CLASSES[self.kind][0](
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=262144,
            rope_parameters=rope,
            **more,
        )

    def empty(self, dtype: torch.dtype) -> Any:
        """The transformers model on the meta device: shapes without weights."""
        with torch.device("meta"):
            return _CLASSES[self.kind][1]._from_config(self.config(), dtype=dtype, attn_implementation="sdpa")


#: arXiv:2606.05843 has no InternVL3.5; it is tried with the numbers of Qwen3-VL-8B, whose shape it shares
SIZES: dict[str, TextSize] = {
    "qwen3-vl-8b": TextSize("qwen3_vl", 36, 32, 8, 128, 4096, 12288, 151936, (20, 30, 50, 100, 150, 250)),
    "qwen3-vl-32b": TextSize("qwen3_vl", 64, 64, 8, 128, 5120, 25600, 151936, (50, 100, 150, 200, 250, 300)),
    "llava-onevision-7b": TextSize("qwen2", 28, 28, 4, 128, 3584, 18944, 152064, (20, 30, 50, 100, 150, 200)),
    "internvl3.5-8b": TextSize("qwen3", 36, 32, 8, 128, 4096, 12288, 151936, (20, 30, 50, 100, 150, 250)),
    "tiny": TextSize("qwen3_vl", 3, 4, 2, 16, 64, 96, 512, (2, 4)),
}


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
