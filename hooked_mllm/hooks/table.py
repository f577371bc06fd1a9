"""The table of hook points: hooks, cache keys, nnsight and the manual's page are made from it.

A hook point takes one entry here; with `carrier="computed"`, also a getter and setter in `wiring/computed.py`.
"""

import re
from dataclasses import dataclass
from functools import partial
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
    """One entry of the table: a hook point of one block, or of a tower outside of its blocks."""

    suffix: str  # the name without tower and block, such as "attn.hook_z"
    axes: str  # such as "batch pos head d_head"
    meaning: str
    #: the module that takes or returns the activation: a field of `BlockParts`, "" for the block itself; outside of
    #: blocks an attribute of `Family`
    part: str | None = None
    side: Side = "output"
    towers: tuple[TowerName, ...] = ("text", "vision")
    in_block: bool = True
    carrier: Carrier = "module"
    argument: str | None = None  # the keyword argument of the module that holds it; None for the first argument
    optional: bool = False  # blocks without that module, or without that step, have no such point
    in_place: bool = False  # the block reads the same tensor again: an edit must be written into it
    #: the field of `BlockParts` that names a gain, which multiplies the module's output: where a family sets it, the
    #: activation is computed
    gain: str | None = None
    aliases: tuple[str, ...] = ()  # other short names of the point in keys of a cache

    def __post_init__(self) -> None:
        if self.part is None and self.carrier in ("module", "norm"):
            raise HookValueError(
                f"The entry of {self.suffix!r} is read at a module, so it needs a part: name the field of BlockParts "
                "or the attribute of Family, or set another carrier."
            )

    def name(self, tower: TowerName, layer: int | str | None = None) -> str:
        """The full name of the point, such as "vision.blocks.0.attn.hook_z"."""
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

_text = partial(PointSpec, in_block=False, towers=("text",))
_vision = partial(PointSpec, in_block=False, towers=("vision",), carrier="family")
_projector = partial(PointSpec, in_block=False, towers=("projector",), part="projector")
_norm = partial(PointSpec, carrier="norm")
_in_attention = partial(PointSpec, carrier="attention")
_computed = partial(PointSpec, carrier="computed")
_hidden = partial(PointSpec, optional=True)  # a mixture of experts has no single hidden layer
_NORMALIZED = "the norm's input divided by its scale, before gain and bias: not yet its output"

#: every hook point, in the order of the forward pass of each tower
HOOK_POINTS: tuple[PointSpec, ...] = (
    _text(
        "hook_embed",
        STREAM,
        "token embeddings, with the visual features at visual positions",
        part="language_model",
        side="input",
        argument="inputs_embeds",
    ),
    _vision("hook_patch_embed", "batch patch d_model", "embedded patches, before positions are added", "patch_embed"),
    # -- of every block ------------------------------------------------------------------------------------------------
    PointSpec("hook_resid_pre", STREAM, "residual stream entering the block", "", "input"),
    _norm("ln1.hook_scale", SCALE, "what the norm before attention divides by", "ln1"),
    _norm("ln1.hook_normalized", STREAM, _NORMALIZED, "ln1"),
    PointSpec("attn.hook_in", STREAM, "what attention takes, for q, k and v: the output of its norm", "ln1"),
    PointSpec("attn.hook_q", HEADS, "queries before rotation", "q", aliases=("query",)),
    PointSpec("attn.hook_k", KEY_VALUE_HEADS, "keys before rotation", "k", aliases=("key",)),
    PointSpec("attn.hook_v", KEY_VALUE_HEADS, "values", "v", aliases=("value",)),
    _in_attention("attn.hook_rot_q", HEADS, "queries after rotation, as attention takes them"),
    _in_attention("attn.hook_rot_k", KEY_VALUE_HEADS, "keys after rotation"),
    _in_attention(
        "attn.hook_attn_scores", SCORES, "scores before the softmax, scaled and masked", aliases=("attn_logits",)
    ),
    _in_attention("attn.hook_pattern", SCORES, "attention after the softmax", aliases=("attn",)),
    _in_attention("attn.hook_z", HEADS, "each head's mix of values, before W_O", "o", "input"),
    _computed("attn.hook_result", "batch pos head d_model", "what each head writes; the sum plus the bias is attn_out"),
    PointSpec("hook_attn_out", STREAM, "what attention adds to the residual stream", "attn", gain="attn_gain"),
    # in place: the block adds the MLP's output to the tensor that it passes to the norm
    PointSpec("hook_resid_mid", STREAM, "residual stream between attention and MLP", "ln2", "input", in_place=True),
    _norm("ln2.hook_scale", SCALE, "what the norm before the MLP divides by", "ln2"),
    _norm("ln2.hook_normalized", STREAM, _NORMALIZED, "ln2"),
    PointSpec("mlp.hook_in", STREAM, "what the MLP takes: the output of its norm", "ln2"),
    _hidden(
        "mlp.hook_pre",
        HIDDEN,
        "before the activation function (of a gated MLP, the gate)",
        "mlp_in",
        aliases=("mlp_pre",),
    ),
    _hidden("mlp.hook_pre_linear", HIDDEN, "the other factor of a gated MLP", "mlp_linear"),
    _hidden(
        "mlp.hook_post", HIDDEN, "hidden layer, before the last projection", "mlp_out", "input", aliases=("mlp_post",)
    ),
    PointSpec("hook_mlp_out", STREAM, "what the MLP adds to the residual stream", "mlp", gain="mlp_gain"),
    PointSpec("hook_resid_post", STREAM, "residual stream leaving the block", ""),
    _computed(
        "hook_deepstack",
        STREAM,
        "visual features added after the block; zero at text positions",
        towers=("text",),
        optional=True,
    ),
    # -- after the blocks ----------------------------------------------------------------------------------------------
    _vision("hook_out", STREAM, "output of the vision tower"),
    _projector("hook_in", "batch in d_in", "input of the projector", side="input"),
    _projector("hook_out", "batch out d_model", "visual features in the width of the language model"),
    _text("ln_final.hook_scale", SCALE, "what the final norm divides by", "ln_final", carrier="norm"),
    _text("ln_final.hook_normalized", STREAM, _NORMALIZED, "ln_final", carrier="norm"),
    _text("hook_logits", "batch pos d_vocab", "logits", "lm_head"),
)


def specs(tower: TowerName | None = None, *, in_block: bool | None = None) -> list[PointSpec]:
    """The entries of the table, of one tower or all, inside of blocks or outside (`in_block`), in forward order."""
    return [
        spec
        for spec in HOOK_POINTS
        if (tower is None or tower in spec.towers) and (in_block is None or spec.in_block == in_block)
    ]


#: short names of points of a block: of query heads, of key-value heads, and of the residual stream and its summands
QUERY_SITES = tuple(
    spec.short
    for spec in specs("text", in_block=True)
    if "head" in spec.axes.split() and spec.carrier != "computed" and spec.short != "attn_scores"
)
KEY_VALUE_SITES = tuple(spec.short for spec in specs("text", in_block=True) if spec.has_key_value_heads)
STREAM_SITES = tuple(
    spec.short
    for spec in specs("text", in_block=True)
    if spec.axes == STREAM and not spec.group and spec.carrier != "computed"
)


def split_name(name: str) -> tuple[TowerName, int | None, str]:
    """Tower, block and suffix of a full name: ("vision", 2, "attn.hook_z") of "vision.blocks.2.attn.hook_z"."""
    match = _NAME.fullmatch(name)
    if match is None:
        return "text", None, name
    tower, layer, suffix = match.groups()
    return cast(TowerName, tower or "text"), None if layer is None else int(layer), suffix


def spec_of(name: str) -> PointSpec | None:
    """The entry of a full name; None if the table has none."""
    tower, layer, suffix = split_name(name)
    return next((s for s in specs(tower, in_block=layer is not None) if s.suffix == suffix), None)


def is_quadratic(name: str) -> bool:
    """Whether the activation of a full name is queries by keys: attention scores and patterns."""
    spec = spec_of(name)
    return spec is not None and spec.quadratic
