"""The table of hook points: what it states, and that hooks, cache keys, nnsight and the manual's page read it."""

import pytest
import torch

from helpers import hook_points_page
from helpers.tiny import ALL_FAMILIES
from helpers.wrapped import fresh, model_inputs, plain, wrapped
from hooked_mllm import HookedMLLM
from hooked_mllm.cache.keys import full_name
from hooked_mllm.errors import HookNameError, HookValueError
from hooked_mllm.hooks import table
from hooked_mllm.hooks.table import (
    KEY_VALUE_SITES,
    QUERY_SITES,
    STREAM_SITES,
    PointSpec,
    is_quadratic,
    spec_of,
    specs,
    split_name,
)

#: what attention takes, by a name that is not in the table
ENTRY = PointSpec("attn.hook_taken", "batch pos d_model", "input of attention", part="ln1", aliases=("attn_taken",))
NORMS = {"qwen3_vl": "norm1", "llava_onevision": "layer_norm1", "internvl": "layernorm_before"}


def test_names_are_unique_and_suffixes_unambiguous():
    names = [spec.name(tower, 0) for tower in ("text", "vision", "projector") for spec in specs(tower)]
    assert len(names) == len(set(names)) > 50
    unambiguous = [s for s in specs(in_block=True) if s.group[:2] != "ln" and s.short != "in"]  # others name their part
    keys = [k for spec in unambiguous for k in (spec.short, *spec.aliases)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_every_name_of_a_model_has_one_entry_which_gives_the_name_again(name):
    for hook_name, point in wrapped(name).hook_dict.items():
        spec, (tower, layer, suffix) = spec_of(hook_name), split_name(hook_name)
        assert spec is not None and spec.suffix == suffix and spec.name(tower, layer) == hook_name
        assert tower == point.tower and spec.in_block == (layer is not None)
        assert layer is None or point.layer() == layer


def test_points_are_in_the_order_of_the_table():
    names = [n for n in wrapped("qwen3_vl").hook_dict if n.startswith("blocks.0.")]
    assert names == [s.name("text", 0) for s in specs("text", in_block=True)]


@pytest.mark.parametrize(
    ("name", "heads", "key_value", "splits", "quadratic"),
    [
        ("blocks.0.attn.hook_q", True, False, True, False),
        ("blocks.0.attn.hook_v", True, True, True, False),
        ("vision.blocks.1.attn.hook_z", True, False, True, False),
        ("blocks.0.attn.hook_rot_k", True, True, False, False),
        ("blocks.0.attn.hook_pattern", True, False, False, True),
        ("vision.blocks.0.attn.hook_attn_scores", True, False, False, True),
        ("blocks.0.attn.hook_result", True, False, False, False),
        ("blocks.0.hook_resid_pre", False, False, False, False),
        ("projector.hook_out", False, False, False, False),
    ],
)
def test_facts_that_follow_from_the_axes(name, heads, key_value, splits, quadratic):
    spec = spec_of(name)
    assert (spec.has_heads, spec.has_key_value_heads, spec.splits_heads) == (heads, key_value, splits)
    assert spec.quadratic == is_quadratic(name) == quadratic


@pytest.mark.parametrize("name", ["nowhere", "blocks.0.hook_embed", "hook_resid_pre", "vision.hook_logits", ""])
def test_other_names_have_no_entry(name):
    assert spec_of(name) is None and not is_quadratic(name)


@pytest.mark.parametrize("carrier", ["module", "norm"])
def test_an_entry_without_the_module_that_it_is_read_at_is_an_error(carrier):
    with pytest.raises(HookValueError, match="'hook_new' is read at a module, so it needs a part: name the field"):
        PointSpec("hook_new", "batch pos d_model", "nothing", carrier=carrier)


# -- one entry more ----------------------------------------------------------------------------------------------------


@pytest.fixture
def extended(monkeypatch, family):
    """A model that is wrapped while the table has one entry more."""
    position = [spec.suffix for spec in table.HOOK_POINTS].index("attn.hook_q")
    points = (*table.HOOK_POINTS[:position], ENTRY, *table.HOOK_POINTS[position:])
    monkeypatch.setattr(table, "HOOK_POINTS", points)
    return HookedMLLM.from_model(fresh(family), check=False)


@torch.no_grad()
def test_one_entry_gives_a_hook_point_in_both_towers(extended, family):
    inputs, witnessed = model_inputs(family), {}
    blocks = {"": extended.family.text.blocks, "vision.": extended.family.vision.blocks}
    model = plain(family)
    handles = [
        model.get_submodule(f"{blocks[prefix]}.1.{norm}").register_forward_hook(
            lambda module, args, out, prefix=prefix: witnessed.__setitem__(prefix, out)
        )
        for prefix, norm in (("", "input_layernorm"), ("vision.", NORMS[family]))
    ]
    expected = model(**inputs).logits
    for handle in handles:
        handle.remove()
    for prefix, value in witnessed.items():
        name, seen = f"{prefix}blocks.1.attn.hook_taken", []
        logits = extended.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook, seen=seen: seen.append(x.clone()))])
        assert torch.equal(logits, expected)
        assert torch.equal(seen[0].reshape(value.shape), value) and seen[0].dim() == 3
        edited = extended.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: x * 0)])
        assert (edited - expected).abs().max() > 1e-3
    names = [n for n in extended.hook_dict if n.startswith("blocks.0.attn")]
    assert names[:3] == [f"blocks.0.attn.hook_{suffix}" for suffix in ("in", "taken", "q")]


@torch.no_grad()
def test_one_entry_gives_keys_of_a_cache(extended, family):
    _, cache = extended.run_with_cache(model_inputs(family))
    value = cache["blocks.1.attn.hook_taken"]
    for key in (("taken", 1), ("attn_taken", 1), ("taken", 1, "attn"), "taken1"):
        assert torch.equal(cache[key], value), key
    assert torch.equal(cache["vision", "attn_taken", 0], cache["vision.blocks.0.attn.hook_taken"])
    assert full_name(("projector", "in"), {"text": 3, "vision": 2}) == "projector.hook_in"


@torch.no_grad()
def test_one_entry_gives_a_name_in_nnsight(extended, family):
    inputs, name = model_inputs(family), "blocks.1.attn.hook_taken"
    assert name in extended.nnsight.names and "vision.blocks.0.attn.hook_taken" in extended.nnsight.names
    with extended.nnsight.trace(inputs) as tracer:
        value = extended.nnsight[name].clone().save()
        extended.nnsight[name] = torch.zeros_like(value)
        logits = tracer.result.save()
    assert torch.equal(value, extended.run_with_cache(inputs, name)[1][name])
    zero = [(name, lambda x, hook: torch.zeros_like(x))]
    assert torch.equal(logits, extended.run_with_hooks(inputs, fwd_hooks=zero))


def test_one_entry_gives_a_line_of_the_manual(extended, family):
    names = {family: list(extended.hook_dict)}
    line = "| `{}blocks.{{l}}.attn.hook_taken` | batch pos d_model | input of attention |"
    for tower, prefix in (("text", ""), ("vision", "vision.")):
        assert line.format(prefix) in hook_points_page.table_lines(tower, names)


def test_an_entry_that_is_computed_needs_a_getter_and_setter(monkeypatch):
    entry = PointSpec("hook_new", "batch pos d_model", "nothing yet", carrier="computed")
    monkeypatch.setattr(table, "HOOK_POINTS", (*table.HOOK_POINTS, entry))
    with pytest.raises(HookNameError, match=r"'hook_new' as computed, but wiring/computed.py has no getter"):
        HookedMLLM.from_model(fresh("internvl"), check=False)


def test_an_entry_for_a_part_that_a_family_does_not_name_gives_no_point(monkeypatch):
    entry = PointSpec("hook_other", "batch pos d_mlp", "a module of gated MLPs", part="mlp_linear")
    monkeypatch.setattr(table, "HOOK_POINTS", (*table.HOOK_POINTS, entry))
    names = HookedMLLM.from_model(fresh("internvl"), check=False).hook_dict
    assert "blocks.0.hook_other" in names and "vision.blocks.0.hook_other" not in names


def test_sites_of_patches_and_steering_are_those_of_the_table():
    assert set(QUERY_SITES) == {"q", "rot_q", "pattern", "z"} and set(KEY_VALUE_SITES) == {"k", "v", "rot_k"}
    assert STREAM_SITES == ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
