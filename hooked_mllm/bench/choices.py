"""The choices of a benchmark, sizes of text decoders and attention backends, without an import of torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

#: forward passes before timing, and timed ones
WARM_UP, RUNS = 2, 5
#: the choices of `--backends`, with their titles in tables
BACKENDS = {
    "cudnn": "cuDNN",
    "flash": "FlashAttention-2",
    "sdpa": "SDPA, torch's choice",
    "eager": "eager",
    "hybrid": "hybrid, {} dense",
    "removed": "attention removed",
    "cudnn-compiled": "cuDNN, rest compiled",
    "sdpa-compiled": "SDPA, rest compiled",
    "hybrid-compiled": "hybrid, {} dense, rest compiled",
    "removed-compiled": "attention removed, rest compiled",
}
#: names of transformers' configuration and model classes
_CLASSES = {
    "qwen3_vl": ("Qwen3VLTextConfig", "Qwen3VLTextModel"),
    "qwen3": ("Qwen3Config", "Qwen3Model"),
    "qwen2": ("Qwen2Config", "Qwen2Model"),
}


@dataclass(frozen=True)
class TextSize:
    """The shape of one text decoder.

    Attributes:
        kind: The text model of Qwen3-VL, Qwen3 (InternVL3.5) or Qwen2 (LLaVA-OneVision) in transformers.
        heads: Query heads per layer.
        d_head: Width of a head.
        hidden: Width of the residual stream.
        mlp: Width of the MLP's hidden layer.
        vocabulary: Number of tokens.
        dense: Default numbers of dense heads: those of table 2 of the paper, if it contains this model.
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

    def config(self) -> "PreTrainedConfig":
        """The transformers configuration."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
        more = {} if self.kind == "qwen2" else {"head_dim": self.d_head}  # of Qwen2, it is hidden / heads
        if self.kind == "qwen3_vl":
            half = self.d_head // 2
            side = half * 20 // 64  # 24, 20, 20 of 64
            rope |= {"rope_theta": 5e6, "mrope_section": [half - 2 * side, side, side], "mrope_interleaved": True}
        return self._classes()[0](
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

    def empty(self, dtype: "torch.dtype") -> Any:
        """The transformers model on the meta device: shapes without weights."""
        import torch

        with torch.device("meta"):
            return self._classes()[1]._from_config(self.config(), dtype=dtype, attn_implementation="sdpa")

    def _classes(self) -> tuple[Any, Any]:
        import transformers

        configuration, model = _CLASSES[self.kind]
        return getattr(transformers, configuration), getattr(transformers, model)


#: arXiv:2606.05843 has no InternVL3.5; its numbers of dense heads are those of Qwen3-VL-8B, which has the same shape
SIZES: dict[str, TextSize] = {
    "qwen3-vl-8b": TextSize("qwen3_vl", 36, 32, 8, 128, 4096, 12288, 151936, (20, 30, 50, 100, 150, 250)),
    "qwen3-vl-32b": TextSize("qwen3_vl", 64, 64, 8, 128, 5120, 25600, 151936, (50, 100, 150, 200, 250, 300)),
    "llava-onevision-7b": TextSize("qwen2", 28, 28, 4, 128, 3584, 18944, 152064, (20, 30, 50, 100, 150, 200)),
    "internvl3.5-8b": TextSize("qwen3", 36, 32, 8, 128, 4096, 12288, 151936, (20, 30, 50, 100, 150, 250)),
    "tiny": TextSize("qwen3_vl", 3, 4, 2, 16, 64, 96, 512, (2, 4)),
}
