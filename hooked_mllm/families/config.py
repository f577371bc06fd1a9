"""The sizes of a model, in the field's names."""

from dataclasses import dataclass
from typing import Any

from hooked_mllm.families.base import Family


@dataclass(frozen=True)
class HookedConfig:
    """Sizes of a model, in TransformerLens's names; a vision tower's carry `vision_`.

    Attributes:
        model_class: The transformers class.
        family: The family's name.
        n_layers: Blocks of the language model.
        n_heads: Query heads of a block.
        n_key_value_heads: Key and value heads of a block.
        d_model: Width of the residual stream.
        d_head: Width of a head.
        d_mlp: Width of the MLP's hidden layer.
        d_vocab: Size of the vocabulary (rows of the unembedding).
        n_deepstack: Blocks after which visual features are added.
        vision_n_layers: Blocks of the vision tower whose output the language model sees.
        vision_n_heads, vision_d_model, vision_d_head: The same of the vision tower.
    """

    model_class: str
    family: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_deepstack: int
    vision_n_layers: int
    vision_n_heads: int
    vision_d_model: int
    vision_d_head: int

    @classmethod
    def of(cls, model: Any, family: Family) -> "HookedConfig":
        """Read the sizes off a transformers model."""
        text, vision = family.text_config(model.config), family.vision_config(model.config)
        heads = family.vision_heads(model.config)
        return cls(
            model_class=type(model).__name__,
            family=family.name,
            n_layers=len(model.get_submodule(family.text.blocks)),
            n_heads=text.num_attention_heads,
            n_key_value_heads=text.num_key_value_heads,
            d_model=text.hidden_size,
            d_head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            d_mlp=text.intermediate_size,
            d_vocab=model.get_submodule(family.lm_head).weight.shape[0],
            n_deepstack=family.n_deepstack(model),
            vision_n_layers=family.vision_depth(model),
            vision_n_heads=heads,
            vision_d_model=vision.hidden_size,
            vision_d_head=vision.hidden_size // heads,
        )
