"""Writes docs/hook-points.md from the table of hook points; the axes of every name are checked against a run."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from helpers.tiny import ALL_FAMILIES, tiny_image, tiny_model, tiny_processor
from hooked_mllm import HookedMLLM
from hooked_mllm.hooks.table import PointSpec, TowerName, spec_of, specs, split_name

PAGE = Path(__file__).parents[2] / "docs" / "hook-points.md"
LABELS = {
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL MoE",
    "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL3.5",
}
TITLES: dict[TowerName, str] = {"text": "Language model", "vision": "Vision tower", "projector": "Projector"}
INTRO = """\
# Hook points

<!-- written by tests/helpers/hook_points_page.py from hooked_mllm/hooks/table.py; a test keeps it up to date -->

The names are TransformerLens's. `{l}` is a block, from 0. What a multimodal model adds keeps the same grammar: the
vision tower has the suffixes of a text block behind `vision.`, the projector has `hook_in` and `hook_out`.

Names are given whole (`"blocks.3.attn.hook_z"`), as a glob (`"blocks.*.attn.hook_z"`), a compiled regular expression, a
predicate, or a list of these. The cache also takes short forms: `cache["z", 3]`, `cache["pattern", -1]`,
`cache["vision", "resid_post", 0]`, `cache["scale", 3, "ln1"]`, `cache["projector", "out"]`. A name that a model lacks
is an error that lists the nearest ones; `model.hook_dict` contains all names.

Each block divides what a norm takes by `hook_scale`, which gives `hook_normalized`; the norm's gain (and bias) then
gives `attn.hook_in` or `mlp.hook_in`, what attention and the MLP take. An edit there reaches q, k and v, or both
projections of a gated MLP. These are TransformerLens's names too; there, a block's `hook_attn_in` and `hook_mlp_in`
are copies of the residual stream before the norm.

A hook receives the activation in the model's dtype; what it returns or writes takes effect. In `generate` it is called
in the prefill (`hook.step == 0`) and in every decoding step. Patterns and scores are computed only for hooks on them:
that block alone, in that call, uses explicit attention.
"""
VISION_NOTES = """\
`head` counts the tower's own heads; it has no grouped keys, so `kv_head == head`. The meaning of `batch` and `pos`
depends on the family:

| family | batch | pos |
| --- | --- | --- |
| Qwen3-VL | 1 | the patches of all images and frames of the batch, packed in one row |
| LLaVA-OneVision | tile or frame | its patches |
| InternVL3.5 | tile or frame | the class token, then its patches |
"""
ADDING = """\
## Adding a hook point

All names come from one table, `hooked_mllm/hooks/table.py`. Hooks, keys of a cache, `model.nnsight` and this page are
made from it.

1. Add an entry at its place in the forward pass: suffix, axes, meaning, and the `part` and `side` that hold the
   activation. `part` is a field of [`BlockParts`](api/families.md), such as `"ln1"`; `side` is `"input"` or `"output"`.
2. Only for an activation that no module takes or returns: set `carrier="computed"`, and add a getter and setter to
   `hooked_mllm/wiring/computed.py`.

Then write this page again with `PYTHONPATH=tests python -m helpers.hook_points_page`.
"""


def _model(family: str) -> HookedMLLM:
    return HookedMLLM.from_model(tiny_model(family), tiny_processor(family))


def _shapes(model: HookedMLLM) -> dict[str, tuple[int, ...]]:
    sample = model.prepare("What colour is the mug?", images=[tiny_image()])
    _, cache = model.run_with_cache(sample)
    return {name: tuple(cache[name].shape) for name in model.hook_dict}


def check_axes(model: HookedMLLM, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every activation has the axes of the table, and an axis has one size throughout a tower."""
    cfg = model.cfg
    sizes = {
        "text": dict(head=cfg.n_heads, kv_head=cfg.n_key_value_heads, d_head=cfg.d_head, d_model=cfg.d_model)
        | dict(d_mlp=cfg.d_mlp, d_vocab=cfg.d_vocab),
        "vision": dict(head=cfg.vision_n_heads, kv_head=cfg.vision_n_heads, d_head=cfg.vision_d_head)
        | dict(d_model=cfg.vision_d_model),
        "projector": dict(d_model=cfg.d_model),
    }
    for name, shape in shapes.items():
        spec, known = spec_of(name), sizes[model.hook_dict[name].tower]
        assert spec is not None, f"{name} is not in the table"
        axes = spec.axes.split()
        assert axes[0] == "batch" and len(axes) == len(shape), (name, axes, shape)
        for axis, size in zip(axes, shape, strict=True):
            axis = {"query": "pos", "key": "pos"}.get(axis, axis)
            expected = 1 if axis == "1" else known.setdefault(axis, size)
            assert size == expected, (name, axis, size, expected)


def table_lines(tower: TowerName, names: Mapping[str, Iterable[str]]) -> list[str]:
    """The Markdown table of one tower, from the hook names of each family."""
    lines = ["| name | axes | what |", "| --- | --- | --- |"]
    for spec in specs(tower):
        families = [family for family in names if any(_is_of(spec, tower, name) for name in names[family])]
        if not families:
            continue
        only = "" if len(families) == len(names) else f" ({', '.join(LABELS[f] for f in families)})"
        lines.append(f"| `{spec.name(tower, '{l}')}` | {spec.axes} | {spec.meaning}{only} |")
    return lines


def _is_of(spec: PointSpec, tower: TowerName, name: str) -> bool:
    return split_name(name)[0] == tower and spec_of(name) == spec


def page() -> str:
    """The whole page."""
    names = {}
    for family in ALL_FAMILIES:
        model = _model(family)
        check_axes(model, _shapes(model))
        names[family] = list(model.hook_dict)
    unused = {spec.suffix for spec in specs()} - {spec_of(name).suffix for family in names for name in names[family]}
    assert not unused, f"no family has {unused}"
    parts = [INTRO]
    for tower, title in TITLES.items():
        parts.append(f"## {title}\n")
        if tower == "vision":
            parts.append(VISION_NOTES)
        parts += [*table_lines(tower, names), ""]
    return "\n".join([*parts, ADDING])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
