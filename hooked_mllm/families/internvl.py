"""InternVL3.5 as `InternVLForConditionalGeneration`: tiles and a thumbnail, CLS dropped, pixel shuffle, LayerScale in the tower."""

from typing import Any

from torch import Tensor, nn

from hooked_mllm.families.base import BlockParts, Family, TowerParts
from hooked_mllm.layout.items import Media, VisualItem


class InternVL(Family):
    """InternVL (native transformers class), over a Qwen3 or Qwen2 language model."""

    name = "internvl"
    model_types = ("internvl",)
    model_classes = ("InternVLForConditionalGeneration",)
    text = TowerParts(
        root="model.language_model",
        blocks="model.language_model.layers",
        block=BlockParts(
            ln1="input_layernorm",
            attn="self_attn",
            q="self_attn.q_norm|self_attn.q_proj",  # Qwen3 normalises each head, Qwen2 does not
            k="self_attn.k_norm|self_attn.k_proj",
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
        blocks="model.vision_tower.encoder.layer",
        block=BlockParts(
            ln1="layernorm_before",
            attn="attention",
            q="attention.q_norm",
            k="attention.k_norm",
            v="attention.v_proj",
            o="attention.projection_layer",
            ln2="layernorm_after",
            mlp="mlp",
            mlp_in="mlp.fc1",
            mlp_out="mlp.fc2",
            attn_gain="lambda_1",
            mlp_gain="lambda_2",
        ),
        causal=False,
        softmax_float32=False,
    )
    patch_embed = "model.vision_tower.embeddings.patch_embeddings"
    projector = "model.multi_modal_projector"

    def vision_heads(self, config: Any) -> int:
        return config.vision_config.num_attention_heads

    def vision_out_module(self) -> tuple[str, str]:
        return "model.vision_tower", "output"

    def vision_out_value(self, output: Any, model: nn.Module) -> Tensor:
        layer = model.config.vision_feature_layer
        return output.last_hidden_state if layer == -1 else output.hidden_states[layer]

    def vision_out_replace(self, value: Tensor, output: Any, model: nn.Module) -> Any:
        layer = model.config.vision_feature_layer
        if layer == -1:
            output.last_hidden_state = value
        else:
            states = list(output.hidden_states)
            states[layer] = value
            output.hidden_states = tuple(states)
        return output

    def visual_token_ids(self, config: Any) -> tuple[int, ...]:
        return (config.image_token_id,)

    def visual_items(
        self, model_config: Any, processor: Any, inputs: dict[str, Tensor], media: Media
    ) -> list[VisualItem]:
        raise NotImplementedError  # H1
