"""What one model family must say of itself: which module plays which part, and how pixels become tokens."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hooked_mllm.errors import InputError, UnsupportedModelError
from hooked_mllm.layout.items import Media, Patches, VisualItem

#: ranges (start, stop) of rows of a vision tower
Rows = list[tuple[int, int]]


@dataclass(frozen=True)
class BlockParts:
    """Module paths inside one transformer block, as dotted names relative to the block.

    `q`, `k`, `v` name the modules whose output is the tensor before rotation; `qkv` replaces them where the projection
    is fused. `pre` and `post` of the MLP: output of the first projection, input of the last one. `attn_gain` and
    `mlp_gain` name per-channel gains that the block applies after attention and after the MLP (LayerScale).
    """

    ln1: str
    attn: str
    o: str
    ln2: str
    mlp: str
    mlp_in: str
    mlp_out: str
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    mlp_linear: str | None = None
    attn_gain: str | None = None
    mlp_gain: str | None = None


@dataclass(frozen=True)
class TowerParts:
    """One stack of blocks: the module that holds them, their parts, and the shape of what flows through.

    `packed`: hidden states are `[position, d_model]` with the images of the whole batch in one row, each image (each
    frame) attending to itself alone. The hooks then show them as `[1, position, d_model]`.
    """

    root: str
    blocks: str
    block: BlockParts
    causal: bool
    packed: bool = False
    softmax_float32: bool = True


#: the decoder of Qwen2 and Qwen3 models; only the latter normalises q and k of each head
QWEN_DECODER = TowerParts(
    root="model.language_model",
    blocks="model.language_model.layers",
    block=BlockParts(
        ln1="input_layernorm",
        attn="self_attn",
        q="self_attn.q_norm|self_attn.q_proj",
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


class Family(ABC):
    """A model family: module names, what differs in the hooks, and the way from pixels to tokens.

    A subclass lives in one file and is named in `registry.py`; nothing else knows it.
    """

    name: str
    #: `config.model_type` of the checkpoints that this family serves
    model_types: tuple[str, ...]
    #: names of the transformers classes, for messages
    model_classes: tuple[str, ...]
    text: TowerParts
    vision: TowerParts
    embed: str = "model.language_model.embed_tokens"
    language_model: str = "model.language_model"
    ln_final: str = "model.language_model.norm"
    lm_head: str = "lm_head"
    #: the module whose output is `vision.hook_patch_embed`
    patch_embed: str
    projector: str

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def text_config(self, config: Any) -> Any:
        """The configuration of the language model."""
        return config.text_config

    def vision_config(self, config: Any) -> Any:
        """The configuration of the vision tower."""
        return config.vision_config

    @abstractmethod
    def vision_heads(self, config: Any) -> int:
        """Attention heads in one block of the vision tower."""

    def vision_depth(self, model: Any) -> int:
        """How many blocks of the vision tower are on the way to the language model; later ones have no hook points."""
        return len(model.get_submodule(self.vision.blocks))

    def n_deepstack(self, model: Any) -> int:
        """How many decoder blocks are followed by an addition of visual features (DeepStack)."""
        return 0

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def patch_embed_value(self, output: Tensor) -> Tensor:
        """`vision.hook_patch_embed` from the output of the module `patch_embed`, as `[batch, position, d_model]`."""
        return output

    def patch_embed_output(self, value: Tensor, output: Tensor) -> Tensor:
        """The inverse of `patch_embed_value`, in the shape of `output`."""
        return value.reshape(output.shape)

    @abstractmethod
    def vision_out_module(self) -> tuple[str, str]:
        """Where `vision.hook_out` sits: a module path and whether its "input" or its "output" carries it."""

    def vision_out_value(self, output: Any, model: Any) -> Tensor:
        """`vision.hook_out` from what the module of `vision_out_module` takes or returns."""
        return output

    def vision_out_replace(self, value: Tensor, output: Any, model: Any) -> Any:
        """What that module must take or return for `vision.hook_out` to be `value`."""
        return value

    # -- inputs --------------------------------------------------------------------------------------------------------

    #: names of the pixel tensors among the model inputs, in the order of `visual_token_ids`
    pixel_inputs: tuple[str, ...] = ("pixel_values", "pixel_values_videos")

    @abstractmethod
    def visual_token_ids(self, config: Any) -> tuple[int, ...]:
        """Ids of the placeholders whose embeddings are replaced by visual features, one for each of `pixel_inputs`."""

    def check_inputs(self, inputs: dict[str, Any], config: Any) -> None:  # noqa: B027 (most families have nothing to refuse)
        """Raise `InputError` for inputs that the model would take and get wrong."""

    def reset(self, model: Any) -> None:  # noqa: B027 (most families keep nothing)
        """Forget what the model keeps from one call to the next."""

    @abstractmethod
    def vision_rows(self, inputs: Mapping[str, Any], config: Any) -> list[Rows]:
        """Which rows of the vision tower's activations belong to each sample of a batch.

        Rows are positions where the tower is packed, tiles or frames where it is not; images come before videos, as the
        tower is called.
        """

    # -- pixels to tokens ----------------------------------------------------------------------------------------------

    @abstractmethod
    def visual_items(
        self, model_config: Any, processor: Any, inputs: dict[str, Tensor], media: Media
    ) -> list[VisualItem]:
        """Which pixels every visual token of one sample sees, one `VisualItem` per image or video in prompt order."""

    def vision_patches(self, item: VisualItem, config: Any) -> Patches:
        """Which pixels every position of the vision tower sees, of one image or video, in the order of the tower.

        Raises:
            UnsupportedModelError: where a family does not say.
        """
        raise UnsupportedModelError(f"The family {self.name!r} does not say which pixels a patch of its tower sees.")


def share_out(sizes: Sequence[int], units: Sequence[int], due: Sequence[int], start: int = 0) -> list[Rows]:
    """Give consecutive images to samples until each has the tokens that its prompt holds.

    Args:
        sizes: Rows of each image.
        units: Tokens of each image.
        due: Tokens of each sample.
        start: The first row.

    Raises:
        InputError: when images and prompts do not match.
    """
    image, out = 0, []
    for tokens in due:
        first = start
        while tokens > 0 and image < len(sizes):
            tokens, start, image = tokens - units[image], start + sizes[image], image + 1
        if tokens:
            raise InputError(f"Images of {list(units)} tokens do not fill prompts with {list(due)} placeholders.")
        out.append([(first, start)] if start > first else [])
    return out


def resolve(root: nn.Module, path: str) -> nn.Module:
    """The submodule of `root` at a dotted path (`""` is `root` itself)."""
    return root.get_submodule(path)


def depth_of_states(layers: int | Sequence[int], n_blocks: int) -> int:
    """Blocks that must have run for `hidden_states[layer]` of a tower, of one layer or of the last of several."""
    indices = [layers] if isinstance(layers, int) else list(layers)
    return max(i + n_blocks + 1 if i < 0 else i for i in indices)


def counts_of(input_ids: Tensor, token: int) -> list[int]:
    """How many positions of each sample hold `token`."""
    return (input_ids == token).sum(1).tolist()


def placeholder_count(input_ids: Tensor, ids: tuple[int, ...]) -> int:
    """How many positions of `input_ids` hold one of `ids`."""
    return int(torch.isin(input_ids, torch.tensor(ids, device=input_ids.device)).sum())
