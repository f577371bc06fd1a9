"""LLaVA-OneVision: SigLIP tower, base and high-resolution views, a newline token after each row of the high-resolution grid."""

from typing import Any

from torch import Tensor

from hooked_mllm.families.base import BlockParts, Family, TowerParts
from hooked_mllm.layout.items import Media, VisualItem


class LlavaOnevision(Family):
    """LLaVA-OneVision as transformers runs it, over a Qwen2 language model."""

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    model_classes = ("LlavaOnevisionForConditionalGeneration",)
    text = TowerParts(
        root="model.language_model",
        blocks="model.language_model.layers",
        block=BlockParts(
            ln1="input_layernorm",
            attn="self_attn",
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.o_proj",
            ln2="post_attention_layernorm",
            mlp="mlp",
            mlp_in="mlp.gate_proj",
            mlp_linear="mlp.up_proj",
            mlp_out="mlp.down_proj",
        ),
        causal=True,
    )
    vision = TowerParts(
        root="model.vision_tower",
        blocks="model.vision_tower.encoder.layers",
        block=BlockParts(
            ln1="layer_norm1",
            attn="self_attn",
            q="self_attn.q_proj",
            k="self_attn.k_proj",
            v="self_attn.v_proj",
            o="self_attn.out_proj",
            ln2="layer_norm2",
            mlp="mlp",
            mlp_in="mlp.fc1",
            mlp_out="mlp.fc2",
        ),
        causal=False,
    )
    patch_embed = "model.vision_tower.embeddings.patch_embedding"
    projector = "model.multi_modal_projector"

    def vision_heads(self, config: Any) -> int:
        return config.vision_config.num_attention_heads

    def patch_embed_value(self, output: Tensor) -> Tensor:
        return output.flatten(2).transpose(1, 2)

    def patch_embed_output(self, value: Tensor, output: Tensor) -> Tensor:
        return value.transpose(1, 2).reshape(output.shape)

    def vision_out_module(self) -> tuple[str, str]:
        # The model picks hidden_states[vision_feature_layer] and drops CLS if asked to: what the projector takes is the result.
        return self.projector, "input"

    def visual_token_ids(self, config: Any) -> tuple[int, ...]:
        return config.image_token_id, config.video_token_id

    def visual_items(
        self, model_config: Any, processor: Any, inputs: dict[str, Tensor], media: Media
    ) -> list[VisualItem]:
        raise NotImplementedError  # H1
