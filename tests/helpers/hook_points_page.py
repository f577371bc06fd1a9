"""Writes docs/hook-points.md: every name that a model of each family has, its shape checked against a run."""

import re
from pathlib import Path

from helpers.tiny import ALL_FAMILIES, tiny_image, tiny_model, tiny_processor
from hooked_mllm import HookedMLLM

PAGE = Path(__file__).parents[2] / "docs" / "hook-points.md"
LABELS = {
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL MoE",
    "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL3.5",
}

# last parts of a name -> axes after "batch", and what is there
WHAT = {
    "hook_embed": ("pos d_model", "token embeddings, the visual features in their places"),
    "hook_patch_embed": ("patch d_model", "embedded patches, before positions are added"),
    "hook_resid_pre": ("pos d_model", "residual stream entering the block"),
    "ln1.hook_scale": ("pos 1", "what the norm before attention divides by"),
    "ln1.hook_normalized": ("pos d_model", "its output"),
    "attn.hook_q": ("pos head d_head", "queries before rotation"),
    "attn.hook_k": ("pos kv_head d_head", "keys before rotation"),
    "attn.hook_v": ("pos kv_head d_head", "values"),
    "attn.hook_rot_q": ("pos head d_head", "queries after rotation, as attention takes them"),
    "attn.hook_rot_k": ("pos kv_head d_head", "keys after rotation"),
    "attn.hook_attn_scores": ("head query key", "scores before the softmax, scaled and masked"),
    "attn.hook_pattern": ("head query key", "attention after the softmax"),
    "attn.hook_z": ("pos head d_head", "each head's mix of values, before W_O"),
    "attn.hook_result": ("pos head d_model", "what each head writes; the sum plus the bias is attn_out"),
    "hook_attn_out": ("pos d_model", "what attention adds to the residual stream"),
    "hook_resid_mid": ("pos d_model", "residual stream between attention and MLP"),
    "ln2.hook_scale": ("pos 1", "what the norm before the MLP divides by"),
    "ln2.hook_normalized": ("pos d_model", "its output"),
    "mlp.hook_pre": ("pos d_mlp", "before the activation function (of a gated MLP, the gate)"),
    "mlp.hook_pre_linear": ("pos d_mlp", "the other factor of a gated MLP"),
    "mlp.hook_post": ("pos d_mlp", "hidden layer, before the last projection"),
    "hook_mlp_out": ("pos d_model", "what the MLP adds to the residual stream"),
    "hook_resid_post": ("pos d_model", "residual stream leaving the block"),
    "hook_deepstack": ("pos d_model", "visual features added after the block; zero at text positions"),
    "ln_final.hook_scale": ("pos 1", "what the final norm divides by"),
    "ln_final.hook_normalized": ("pos d_model", "its output"),
    "hook_logits": ("pos d_vocab", "logits"),
    "hook_out": ("pos d_model", "what leaves the vision tower"),
    "projector.hook_in": ("in d_in", "what the projector takes"),
    "projector.hook_out": ("out d_model", "visual features in the width of the language model"),
}
INTRO = """\
# Hook points

<!-- written by tests/helpers/hook_points_page.py; a test keeps it up to date -->

The names are TransformerLens's. `{l}` is a block, from 0. What a multimodal model adds keeps the same grammar: the
vision tower has the suffixes of a text block behind `vision.`, the projector has `hook_in` and `hook_out`.

Names are given whole (`"blocks.3.attn.hook_z"`), as a glob (`"blocks.*.attn.hook_z"`), a compiled regular expression, a
predicate, or a list of these. The cache also takes short forms: `cache["z", 3]`, `cache["pattern", -1]`,
`cache["vision", "resid_post", 0]`, `cache["scale", 3, "ln1"]`, `cache["projector", "out"]`. A name that a model lacks
is an error that lists the nearest ones; `model.hook_dict` has them all.

A hook sees the tensor on its way, in the model's dtype, and what it returns or writes takes effect. In `generate` it
fires in the prefill (`hook.step == 0`) and in every decoding step. Patterns and scores are made only if a hook asks for
them: that block alone, for that call, goes through explicit attention.

All shapes begin with `batch`.
"""
VISION_NOTES = """\
`head` counts the tower's own heads; it has no grouped keys, so `kv_head == head`. What `batch` and `pos` are depends on
the family:

| family | batch | pos |
| --- | --- | --- |
| Qwen3-VL | 1 | the patches of all images and frames of the batch, packed in one row |
| LLaVA-OneVision | tile or frame | its patches |
| InternVL3.5 | tile or frame | the class token, then its patches |
"""


def _run(family: str) -> tuple[HookedMLLM, dict[str, tuple[int, ...]]]:
    model = HookedMLLM.from_model(tiny_model(family), tiny_processor(family))
    sample = model.prepare("What colour is the mug?", images=[tiny_image()])
    _, cache = model.run_with_cache(sample)
    return model, {name: tuple(cache[name].shape) for name in model.hook_dict}


def _what(name: str) -> tuple[str, str]:
    found = [suffix for suffix in WHAT if name == suffix or name.endswith(f".{suffix}")]
    return WHAT[max(found, key=len)]


def _checked_axes(name: str, shape: tuple[int, ...], sizes: dict[str, int]) -> str:
    """The axes of a name, after one look whether they fit: an axis has one size throughout a tower."""
    axes = ["batch", *_what(name)[0].split()]
    assert len(axes) == len(shape), (name, axes, shape)
    for axis, size in zip(axes, shape, strict=True):
        axis = {"query": "pos", "key": "pos"}.get(axis, axis)
        expected = 1 if axis == "1" else sizes.setdefault(axis, size)
        assert size == expected, (name, axis, size, expected)
    return " ".join(axes[1:])


def page() -> str:
    """The whole page."""
    rows: dict[str, dict[str, list[str]]] = {"text": {}, "vision": {}, "projector": {}}
    for family in ALL_FAMILIES:
        model, shapes = _run(family)
        cfg = model.cfg
        sizes = {
            "text": dict(head=cfg.n_heads, kv_head=cfg.n_key_value_heads, d_head=cfg.d_head, d_model=cfg.d_model)
            | dict(d_mlp=cfg.d_mlp, d_vocab=cfg.d_vocab),
            "vision": dict(head=cfg.vision_n_heads, kv_head=cfg.vision_n_heads, d_head=cfg.vision_d_head)
            | dict(d_model=cfg.vision_d_model),
            "projector": dict(d_model=cfg.d_model),
        }
        for name, shape in shapes.items():
            tower = model.hook_dict[name].tower
            _checked_axes(name, shape, sizes[tower])
            general = re.sub(r"blocks\.\d+\.", "blocks.{l}.", name)
            if general not in rows[tower]:
                rows[tower][general] = []
            if family not in rows[tower][general]:
                rows[tower][general].append(family)
    parts = [INTRO]
    for tower, title in (("text", "Language model"), ("vision", "Vision tower"), ("projector", "Projector")):
        parts.append(f"## {title}\n")
        if tower == "vision":
            parts.append(VISION_NOTES)
        parts += ["| name | shape | what |", "| --- | --- | --- |"]
        for name in rows[tower]:
            axes, what = _what(name)
            some = [LABELS[f] for f in rows[tower][name]]
            only = "" if len(some) == len(ALL_FAMILIES) else f" ({', '.join(some)})"
            parts.append(f"| `{name}` | {axes} | {what}{only} |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
