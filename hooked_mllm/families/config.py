"""HookedConfig: the sizes of a model, in TransformerLens's names."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from hooked_mllm.families.base import Family
from hooked_mllm.families.parts import projection_sizes


@dataclass(frozen=True)
class HookedConfig:
    """Sizes of a model, in TransformerLens's names; those of the vision tower begin with `vision_`."""

    model_class: str  # the transformers class
    family: str
    n_layers: int
    n_heads: int  # query heads of a block
    n_key_value_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int  # rows of the unembedding
    n_deepstack: int  # blocks after which visual features are added
    vision_n_layers: int  # blocks on the way to the language model
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
