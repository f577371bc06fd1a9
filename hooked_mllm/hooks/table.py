"""The table of hook points: hooks, cache keys, nnsight and the manual's page are made from it.

A hook point that is the input or the output of a module takes one entry here: its `part` is a field of
`families.BlockParts` (inside a block) or an attribute of `families.Family` (outside). An activation that no module
takes or returns is an entry with `carrier="computed"`, and its getter and setter in `wiring/computed.py`.
"""

import re
from dataclasses import dataclass
from typing import Literal, cast

from hooked_mllm.errors import HookValueError

TowerName = Literal["text", "vision", "projector"]
Side = Literal["input", "output"]
#: where an activation is read and written:
#: "module": in what a module takes or returns; "family": the same, through functions of the family;
#: "norm": within a norm; "attention": within the attention function; "computed": by a getter and setter of the wiring
Carrier = Literal["module", "family", "norm", "attention", "computed"]

_NAME = re.compile(r"(?:(vision|projector)\.)?(?:blocks\.(\d+)\.)?(.+)")


@dataclass(frozen=True)
class PointSpec:
    """One entry of the table: a hook point of one block, or of a tower outside of its blocks.

    Attributes:
        suffix: The name without tower and block, such as "attn.hook_z".
        axes: The axes of the activation, such as "batch pos head d_head".
        meaning: What the activation is, in one line.
        part: The module that takes or returns it: a field of `BlockParts`, "" for the block itself; outside of blocks
            an attribute of `Family`. None if no module does.
        side: The side of that module.
        towers: The towers that have the point.
        in_block: Whether every block has one.
        carrier: Where the activation is read and written.
        argument: The keyword argument of the module that holds it; None for the first argument.
        optional: Blocks without that module, or without that step, have no such point.
        in_place: The block reads the same tensor again after the module, so that an edit must be written into it.
        gain: The field of `BlockParts` that names a gain which the block multiplies the module's output by; where a
            family sets it, the activation is computed.
        aliases: Other short names of the point in keys of a cache.
    """

    suffix: str
    axes: str
    meaning: str
    part: str | None = None
    side: Side = "output"
    towers: tuple[TowerName, ...] = ("text", "vision")
    in_block: bool = True
    carrier: Carrier = "module"
    argument: str | None = None
    optional: bool = False
    in_place: bool = False
    gain: str | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.part is None and self.carrier in ("module", "norm"):
            raise HookValueError(
                f"The entry of {self.suffix!r} is read at a module, so it needs a part: name the field of BlockParts "
                "or the attribute of Family, or set another carrier."
            )

    def name(self, tower: TowerName, layer: int | str | None = None) -> str:
        """The full name of the point.

        Examples:
            >>> spec_of("blocks.3.attn.hook_z").name("vision", 0)
            'vision.blocks.0.attn.hook_z'
        """
        prefix = "" if tower == "text" else f"{tower}."
        return f"{prefix}blocks.{layer}.{self.suffix}" if self.in_block else prefix + self.suffix

    @property
    def short(self) -> str:
        """The short name, as in keys of a cache: "z" of "attn.hook_z"."""
        return self.suffix.rpartition("hook_")[2]

    @property
    def group(self) -> str:
        """The part of the block in the name: "attn" of "attn.hook_z", "" of "hook_resid_pre"."""
        return self.suffix.rpartition("hook_")[0].rstrip(".")

    @property
    def has_heads(self) -> bool:
        """Whether an axis counts query heads or key-value heads."""
        return "head" in self.axes.split() or self.has_key_value_heads

    @property
    def has_key_value_heads(self) -> bool:
        """Whether an axis counts key-value heads."""
        return "kv_head" in self.axes.split()

    @property
    def splits_heads(self) -> bool:
        """Whether the module has all heads in one axis, which the hook point shows as two: head and d_head."""
        return self.part is not None and self.axes.endswith("d_head")

    @property
    def quadratic(self) -> bool:
        """Whether the activation is queries by keys."""
        return self.axes.endswith("query key")


STREAM = "batch pos d_model"
HEADS = "batch pos head d_head"
KEY_VALUE_HEADS = "batch pos kv_head d_head"
SCORES = "batch head query key"
HIDDEN = "batch pos d_mlp"
SCALE = "batch pos 1"

#: every hook point, in the order of the forward pass of each tower
HOOK_POINTS: tuple[PointSpec, ...] = (
    PointSpec(
        "hook_embed",
        STREAM,
        "token embeddings, with the visual features at visual positions",
        part="language_model",
        side="input",
        argument="inputs_embeds",
        towers=("text",),
        in_block=False,
    ),
    PointSpec(
        "hook_patch_embed",
        "batch patch d_model",
        "embedded patches, before positions are added",
        part="patch_embed",
        towers=("vision",),
        in_block=False,
        carrier="family",
    ),
    # -- of every block ------------------------------------------------------------------------------------------------
    PointSpec("hook_resid_pre", STREAM, "residual stream entering the block", part="", side="input"),
    PointSpec("ln1.hook_scale", SCALE, "what the norm before attention divides by", part="ln1", carrier="norm"),
    PointSpec(
        "ln1.hook_normalized",
        STREAM,
        "the norm's input divided by it, before gain and bias",
        part="ln1",
        carrier="norm",
    ),
    PointSpec("attn.hook_q", HEADS, "queries before rotation", part="q", aliases=("query",)),
    PointSpec("attn.hook_k", KEY_VALUE_HEADS, "keys before rotation", part="k", aliases=("key",)),
    PointSpec("attn.hook_v", KEY_VALUE_HEADS, "values", part="v", aliases=("value",)),
    PointSpec("attn.hook_rot_q", HEADS, "queries after rotation, as attention takes them", carrier="attention"),
    PointSpec("attn.hook_rot_k", KEY_VALUE_HEADS, "keys after rotation", carrier="attention"),
    PointSpec(
        "attn.hook_attn_scores",
        SCORES,
        "scores before the softmax, scaled and masked",
        carrier="attention",
        aliases=("attn_logits",),
    ),
    PointSpec("attn.hook_pattern", SCORES, "attention after the softmax", carrier="attention", aliases=("attn",)),
    PointSpec(
        "attn.hook_z", HEADS, "each head's mix of values, before W_O", part="o", side="input", carrier="attention"
    ),
    PointSpec(
        "attn.hook_result",
        "batch pos head d_model",
        "what each head writes; the sum plus the bias is attn_out",
        carrier="computed",
    ),
    PointSpec("hook_attn_out", STREAM, "what attention adds to the residual stream", part="attn", gain="attn_gain"),
    PointSpec(
        "hook_resid_mid",
        STREAM,
        "residual stream between attention and MLP",
        part="ln2",
        side="input",
        in_place=True,  # the block adds the MLP's output to the tensor that it passes to the norm
    ),
    PointSpec("ln2.hook_scale", SCALE, "what the norm before the MLP divides by", part="ln2", carrier="norm"),
    PointSpec(
        "ln2.hook_normalized",
        STREAM,
        "the norm's input divided by it, before gain and bias",
        part="ln2",
        carrier="norm",
    ),
    PointSpec(
        "mlp.hook_pre",
        HIDDEN,
        "before the activation function (of a gated MLP, the gate)",
        part="mlp_in",
        optional=True,  # a mixture of experts has no single hidden layer
        aliases=("mlp_pre",),
    ),
    PointSpec("mlp.hook_pre_linear", HIDDEN, "the other factor of a gated MLP", part="mlp_linear", optional=True),
    PointSpec(
        "mlp.hook_post",
        HIDDEN,
        "hidden layer, before the last projection",
        part="mlp_out",
        side="input",
        optional=True,
        aliases=("mlp_post",),
    ),
    PointSpec("hook_mlp_out", STREAM, "what the MLP adds to the residual stream", part="mlp", gain="mlp_gain"),
    PointSpec("hook_resid_post", STREAM, "residual stream leaving the block", part=""),
    PointSpec(
        "hook_deepstack",
        STREAM,
        "visual features added after the block; zero at text positions",
        towers=("text",),
        carrier="computed",
        optional=True,
    ),
    # -- after the blocks ----------------------------------------------------------------------------------------------
    PointSpec("hook_out", STREAM, "output of the vision tower", towers=("vision",), in_block=False, carrier="family"),
    PointSpec(
        "hook_in",
        "batch in d_in",
        "input of the projector",
        part="projector",
        side="input",
        towers=("projector",),
        in_block=False,
    ),
    PointSpec(
        "hook_out",
        "batch out d_model",
        "visual features in the width of the language model",
        part="projector",
        towers=("projector",),
        in_block=False,
    ),
    PointSpec(
        "ln_final.hook_scale",
        SCALE,
        "what the final norm divides by",
        part="ln_final",
        towers=("text",),
        in_block=False,
        carrier="norm",
    ),
    PointSpec(
        "ln_final.hook_normalized",
        STREAM,
        "the norm's input divided by it, before gain and bias",
        part="ln_final",
        towers=("text",),
        in_block=False,
        carrier="norm",
    ),
    PointSpec("hook_logits", "batch pos d_vocab", "logits", part="lm_head", towers=("text",), in_block=False),
)


def specs(tower: TowerName | None = None, *, in_block: bool | None = None) -> list[PointSpec]:
    """The entries of the table, in the order of the forward pass.

    Args:
        tower: Only those of one tower.
        in_block: Only those of blocks, or only those outside.

    Examples:
        >>> [spec.suffix for spec in specs("projector")]
        ['hook_in', 'hook_out']
    """
    return [
        spec
        for spec in HOOK_POINTS
        if (tower is None or tower in spec.towers) and (in_block is None or spec.in_block == in_block)
    ]


def split_name(name: str) -> tuple[TowerName, int | None, str]:
    """Tower, block and suffix of a full name.

    Examples:
        >>> split_name("vision.blocks.2.attn.hook_z")
        ('vision', 2, 'attn.hook_z')
        >>> split_name("hook_embed")
        ('text', None, 'hook_embed')
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return "text", None, name
    tower, layer, suffix = match.groups()
    return cast(TowerName, tower or "text"), None if layer is None else int(layer), suffix


def spec_of(name: str) -> PointSpec | None:
    """The entry of a full name; None if the table has none.

    Examples:
        >>> spec_of("vision.blocks.2.attn.hook_pattern").axes
        'batch head query key'
    """
    tower, layer, suffix = split_name(name)
    return next((s for s in specs(tower, in_block=layer is not None) if s.suffix == suffix), None)


def is_quadratic(name: str) -> bool:
    """Whether the activation of a full name is queries by keys: attention scores and patterns.

    Examples:
        >>> is_quadratic("blocks.0.attn.hook_pattern"), is_quadratic("blocks.0.attn.hook_z")
        (True, False)
    """
    spec = spec_of(name)
    return spec is not None and spec.quadratic
