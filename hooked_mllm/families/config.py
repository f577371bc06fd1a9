"""HookedConfig: the sizes of a model, in TransformerLens's names."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from hooked_mllm.families.base import Family
from hooked_mllm.families.parts import projection_sizes


@dataclass(frozen=True)
class HookedConfig:
    """Sizes of a model, in TransformerLens's names; those of the vision tower begin with `vision_`.

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
        vision_n_layers: Blocks of the vision tower on the way to the language model.
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
    def of(cls, model: PreTrainedModel, family: Family) -> "HookedConfig":
        """Read the sizes of a transformers model."""
        text, vision = family.text_sizes(model), family.vision_sizes(model)
        return cls(
            model_class=type(model).__name__,
            family=family.name,
            n_layers=len(family.text.modules(model)),
            n_heads=text.n_heads,
            n_key_value_heads=text.n_key_value_heads,
            d_model=text.d_model,
            d_head=text.d_head,
            d_mlp=family.text_config(model.config).intermediate_size,
            d_vocab=projection_sizes(model.get_submodule(family.lm_head))[1],
            n_deepstack=family.n_deepstack(model),
            vision_n_layers=family.vision_depth(model),
            vision_n_heads=vision.n_heads,
            vision_d_model=vision.d_model,
            vision_d_head=vision.d_head,
        )
