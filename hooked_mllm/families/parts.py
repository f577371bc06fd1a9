"""The modules and sizes of one stack of transformer blocks, text or vision."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from hooked_mllm.errors import UnsupportedModelError


@dataclass(frozen=True)
class BlockParts:
    """Module paths inside one transformer block, as dotted names relative to the block.

    `q`, `k`, `v` name the modules whose output is the tensor before rotation; `qkv` replaces them where the projection
    is fused. `mlp_in` and `mlp_out` are the first and the last projection of the MLP, `mlp_linear` the other factor of
    a gated one. `attn_gain` and `mlp_gain` name per-channel gains that the block applies after attention and after the
    MLP (LayerScale). "a|b" is the first of several paths that the block has.

    Raises:
        UnsupportedModelError: If neither q, k and v nor qkv are named.

    Examples:
        >>> QWEN_DECODER.block.o
        'self_attn.o_proj'
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

    def __post_init__(self) -> None:
        if self.qkv is None and None in (self.q, self.k, self.v):
            raise UnsupportedModelError(
                f"BlockParts needs q, k and v, or qkv where the projection is fused; got q={self.q!r}, k={self.k!r}, "
                f"v={self.v!r}. Name the modules whose output is q, k and v before rotation."
            )

    def names(self, field: str | None) -> bool:
        """Whether the family names a module or gain for this field."""
        return field is not None and getattr(self, field, None) is not None

    def path(self, part: str, block: nn.Module) -> str | None:
        """The path of a part ("" is the block itself) in one block; None if it is not named, or the block lacks it.

        Examples:
            >>> block = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(2, 2)})})
            >>> QWEN_DECODER.block.path("q", block)
            'self_attn.q_proj'
        """
        paths = getattr(self, part) if part else ""
        return None if paths is None else next((path for path in paths.split("|") if has_module(block, path)), None)


@dataclass(frozen=True)
class TowerParts:
    """One stack of blocks: its module, the module that contains the blocks, their parts, and the form of its tensors.

    `packed`: hidden states are `[pos d_model]` with the images of the whole batch in one row, and each image (each
    frame) attends to itself only. Hook points show them as `[1 pos d_model]`.
    """

    root: str
    blocks: str
    block: BlockParts
    causal: bool
    packed: bool = False
    softmax_float32: bool = True

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of a model, in order."""
        return list(model.get_submodule(self.blocks).children())


#: the decoder of Qwen2 and Qwen3 models; only Qwen3 normalises q and k of each head
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


@dataclass(frozen=True)
class TowerSizes:
    """Heads of each block in one stack, and widths of the residual stream and of a head."""

    n_heads: int
    n_key_value_heads: int
    d_model: int
    d_head: int


def decoder_sizes(config: PreTrainedConfig) -> TowerSizes:
    """The sizes of a decoder; without `head_dim`, a head is `hidden_size / num_attention_heads` wide."""
    n_heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return TowerSizes(n_heads, config.num_key_value_heads, config.hidden_size, d_head)


def projection_sizes(projection: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear projection; quantised and adapted ones state them, too."""
    d_in, d_out = (getattr(projection, name, None) for name in ("in_features", "out_features"))
    if not isinstance(d_in, int) or not isinstance(d_out, int):
        raise UnsupportedModelError(
            f"{type(projection).__name__} does not state in_features and out_features, from which the width of a tower "
            "is read: override the sizes in the model's family."
        )
    return d_in, d_out


def has_module(module: nn.Module, path: str) -> bool:
    """Whether a module has a submodule at a dotted path ("" is the module itself)."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
