"""Family: what a model family must state. Its file finds what it needs here and in `parts`, `counts` and `geometry`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hooked_mllm.errors import UnsupportedModelError
from hooked_mllm.families.counts import Rows as Rows
from hooked_mllm.families.parts import BlockParts as BlockParts
from hooked_mllm.families.parts import TowerParts as TowerParts
from hooked_mllm.families.parts import TowerSizes as TowerSizes
from hooked_mllm.families.parts import decoder_sizes, projection_sizes
from hooked_mllm.layout.items import Media, Patches, VisualItem


class Family(ABC):
    """A model family: module names and sizes, what differs in its hook points, and the way from pixels to tokens.

    A subclass is one file of this folder and one line of `registry.py`. No other file contains facts of a family.
    """

    name: str
    #: `config.model_type` of the checkpoints of this family
    model_types: tuple[str, ...]
    #: names of the transformers classes, for error messages
    model_classes: tuple[str, ...]
    text: TowerParts
    vision: TowerParts
    embed: str = "model.language_model.embed_tokens"
    ln_final: str = "model.language_model.norm"
    lm_head: str = "lm_head"
    #: the module whose output is `vision.hook_patch_embed`
    patch_embed: str
    projector: str
    #: keyword arguments of the language model with the features of DeepStack, and with the mask of visual positions
    deepstack_arguments: tuple[str, str] | None = None

    @property
    def language_model(self) -> str:
        """The module whose input is `hook_embed`."""
        return self.text.root

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def text_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of the language model."""
        return config.text_config

    def vision_config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of the vision tower."""
        return config.vision_config

    @abstractmethod
    def vision_heads(self, config: PreTrainedConfig) -> int:
        """Attention heads in one block of the vision tower."""

    def text_sizes(self, model: PreTrainedModel) -> TowerSizes:
        """Heads and widths of the language model."""
        return decoder_sizes(self.text_config(model.config))

    def vision_sizes(self, model: PreTrainedModel) -> TowerSizes:
        """Heads and widths of the vision tower, from the attention output projection of its first block.

        Configurations do not agree on a name: Qwen2-VL's `hidden_size` is the width after the projector.
        """
        n_heads = self.vision_heads(model.config)
        block = self.vision.modules(model)[0]
        # [heads * d_head] -> [d_model]
        d_in, d_model = projection_sizes(block.get_submodule(self.vision.block.path("o", block) or self.vision.block.o))
        return TowerSizes(n_heads, n_heads, d_model, d_in // n_heads)

    def vision_depth(self, model: PreTrainedModel) -> int:
        """Number of vision blocks on the way to the language model; later ones have no hook points."""
        return len(self.vision.modules(model))

    def n_deepstack(self, model: PreTrainedModel) -> int:
        """Number of decoder blocks after which visual features are added (DeepStack)."""
        return 0

    def deepstack_of(self, arguments: Mapping[str, Any]) -> tuple[list[Tensor], Tensor | None]:
        """Features `[visual d_model]` of DeepStack, of each block, and mask `[batch pos]`, from keyword arguments."""
        if self.deepstack_arguments is None:
            return [], None
        features, mask = (arguments.get(name) for name in self.deepstack_arguments)
        return list(features or ()), mask

    # -- hook points ---------------------------------------------------------------------------------------------------

    def patch_embed_value(self, output: Float[Tensor, "..."]) -> Float[Tensor, "batch patch d_model"]:
        """`vision.hook_patch_embed` from the output of the module `patch_embed`."""
        return output

    def patch_embed_output(
        self, value: Float[Tensor, "batch patch d_model"], output: Float[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape"]:
        """The inverse of `patch_embed_value`, in the shape of `output`."""
        return value.reshape(output.shape)

    @abstractmethod
    def vision_out_module(self) -> tuple[str, Literal["input", "output"]]:
        """The module path and side ("input" or "output") that hold `vision.hook_out`."""

    def vision_out_value(self, output: Any, model: PreTrainedModel) -> Float[Tensor, "batch pos d_model"]:
        """`vision.hook_out` from the input or output of the module of `vision_out_module`."""
        return output

    def vision_out_replace(self, value: Float[Tensor, "batch pos d_model"], output: Any, model: PreTrainedModel) -> Any:
        """The input or output of that module for which `vision.hook_out` is `value`."""
        return value

    # -- inputs --------------------------------------------------------------------------------------------------------

    #: names of the pixel tensors among the model inputs, in the order of `visual_token_ids`
    pixel_inputs: tuple[str, ...] = ("pixel_values", "pixel_values_videos")

    @abstractmethod
    def visual_token_ids(self, config: PreTrainedConfig) -> tuple[int, ...]:
        """Ids of the placeholders whose embeddings are replaced by visual features, one for each of `pixel_inputs`."""

    def check_inputs(self, inputs: dict[str, Any], config: PreTrainedConfig) -> None:  # noqa: B027 (most need no check)
        """Raise `InputError` for inputs that the model accepts and computes wrong results from."""

    def reset(self, model: PreTrainedModel) -> None:  # noqa: B027 (most models keep nothing)
        """Clear what the model keeps from one call to the next."""

    def state(self, model: PreTrainedModel) -> Any:
        """What the model keeps from one call to the next, for `restore`."""
        return None

    def restore(self, model: PreTrainedModel, state: Any) -> None:  # noqa: B027 (most models keep nothing)
        """Set what the model keeps from one call to the next."""

    @abstractmethod
    def vision_rows(self, inputs: Mapping[str, Any], config: PreTrainedConfig) -> list[Rows]:
        """The rows of the vision tower's activations that belong to each sample of a batch, images before videos.

        Rows are positions where the tower is packed, tiles or frames where it is not.
        """

    # -- pixels to tokens ----------------------------------------------------------------------------------------------

    @abstractmethod
    def visual_items(
        self, model_config: PreTrainedConfig, processor: object, inputs: dict[str, Tensor], media: Media
    ) -> list[VisualItem]:
        """The pixels of every visual token of one sample, one `VisualItem` per image or video in prompt order.

        `processor.image_processor` and `processor.video_processor` have the options of the call; raise an InputError
        for options that do not fit the model.
        """

    def vision_patches(self, item: VisualItem, config: Any) -> Patches:
        """The pixels of every position of the vision tower, for one image or video, in the order of the tower."""
        raise UnsupportedModelError(
            f"The family {self.name!r} does not state which pixels a patch of its tower has: override `vision_patches`."
        )
