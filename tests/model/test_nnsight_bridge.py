"""`model.nnsight` and this package's own hooks are two ways to the same activations: each is the other's witness."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import hooked_mllm
from helpers.tiny import tiny_image, tiny_processor
from helpers.wrapped import edit, fresh, model_inputs, plain, returned
from hooked_mllm import HeadAblation, HookedMLLM
from hooked_mllm.errors import HookNameError, HookValueError, InputError

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
#: what no module takes or returns
NOWHERE = ("scale", "normalized", "rot_q", "rot_k", "attn_scores", "pattern", "result", "deepstack")
SCALED = ("vision.blocks.{}.hook_attn_out", "vision.blocks.{}.hook_mlp_out")  # by InternVL's blocks, outside of modules
MODELS: dict = {}


@pytest.fixture
def model(family):
    """Wrapped by both, one of each family: nnsight leaves a mark on every module, so not the model of other tests."""
    if family not in MODELS:
        MODELS[family] = HookedMLLM.from_model(fresh(family), tiny_processor(family), check=False)
    yield MODELS[family]
    assert not MODELS[family].list_hooks()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def inputs(family):
    return model_inputs(family, 2)


def in_block_one(model, names):
    return [n for n in names if "blocks.1." in n or "blocks." not in n]


def in_running_order(family, names):
    """InternVL's tower makes v before q and k."""
    out = list(names)
    for name in names:
        if family == "internvl" and name.startswith("vision.") and name.endswith("hook_v"):
            out.remove(name)
            out.insert(out.index(name[:-1] + "q"), name)
    return out


EXPECTED: dict = {}


def by_hook(family, model, inputs, name):
    """Logits of the edit that a hook makes."""
    if (family, name) not in EXPECTED:
        EXPECTED[family, name] = model.run_with_hooks(inputs, fwd_hooks=[(name, returned(name))])
    return EXPECTED[family, name]


def changed_by(family, inputs, got):
    return (got - plain(family)(**inputs).logits).abs().max()


# -- reading -----------------------------------------------------------------------------------------------------------


def test_every_name_is_served_unless_no_module_holds_it(model, family):
    names = set(model.nnsight.names)
    missing = {n for n in model.hook_dict if n not in names}
    scaled = {n.format(l) for n in SCALED for l in range(2)} if family == "internvl" else set()
    assert missing == {n for n in model.hook_dict if n.rpartition("hook_")[2] in NOWHERE} | scaled


def test_reads_are_those_of_a_cache_in_its_shapes(model, family, inputs):
    _, cache = model.run_with_cache(inputs)
    names = model.nnsight.names
    with model.nnsight.trace(inputs):
        seen = {}.save()
        for name in in_running_order(family, names):
            seen[name] = model.nnsight[name].clone()
    assert len(seen) > 50 and all(torch.equal(seen[name], cache[name]) for name in names)


def test_reads_are_those_of_nnsight_alone_on_a_model_of_its_own(model, family, inputs):
    from nnsight import NNsight  # after beartype, which cannot be imported behind it

    blocks, last = {
        "qwen3_vl": ("visual.blocks", "attn.proj"),
        "llava_onevision": ("vision_tower.encoder.layers", "self_attn.out_proj"),
        "internvl": ("vision_tower.encoder.layer", "attention.projection_layer"),
    }[family]
    alone = NNsight(fresh(family))
    with alone.trace(**inputs):
        tower = alone.get(f"model.{blocks}")[1]
        vision_z = tower.get(last).input.save()
        block = alone.model.language_model.layers[1]
        v, z = block.self_attn.v_proj.output.save(), block.self_attn.o_proj.input.save()
        out = block.output.save()
    with model.nnsight.trace(inputs):
        vision_got = model.nnsight["vision.blocks.1.attn.hook_z"].save()
        v_got = model.nnsight["blocks.1.attn.hook_v"].save()
        z_got = model.nnsight["blocks.1.attn.hook_z"].save()
        out_got = model.nnsight["blocks.1.hook_resid_post"].save()
    assert v_got.shape[2:] == (2, 8) and z_got.shape[2:] == (4, 8) and vision_got.dim() == 4
    assert torch.equal(v_got.flatten(2), v) and torch.equal(z_got.flatten(2), z) and torch.equal(out_got, out)
    assert torch.equal(vision_got.flatten(2), vision_z.reshape(vision_got.flatten(2).shape))


def test_samples_batches_and_keywords_go_in(model, family):
    one = model.prepare("What colour is the mug?", images=tiny_image(), id="one")
    both = model.prepare(["What colour is the mug?", "Where?"], images=[[tiny_image()], [tiny_image(24, 32)]])
    for given in (one, both, both.inputs):
        with model.nnsight.trace(given) as tracer:
            z = model.nnsight["blocks.2.attn.hook_z"].save()
            logits, result = model.nnsight["hook_logits"].save(), tracer.result.save()
        assert torch.equal(result, model(given)) and torch.equal(result, logits) and z.dim() == 4
    with model.nnsight.trace(**both.inputs, logits_to_keep=1) as tracer:
        result = tracer.result.save()
    assert result.shape[:2] == (2, 1)


def test_a_generation_is_traced_step_by_step(model, family, inputs):
    tokens, cache = model.run_with_cache(inputs, "*hook_z", generate=GREEDY)
    with model.nnsight.generate(inputs, **GREEDY) as tracer:
        steps = [].save()
        for _ in tracer.iter[:3]:
            steps.append(model.nnsight["blocks.1.attn.hook_z"].clone())
        out = tracer.result.save()
    assert torch.equal(out, tokens) and len(steps) == 3
    for step, kept in zip(steps, cache, strict=True):
        assert torch.equal(step, kept["z", 1])


# -- editing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["assigned", "in place"])
def test_edits_do_what_the_same_edits_by_hooks_do(model, family, inputs, way):
    for name in in_block_one(model, model.nnsight.names):
        change = edit(name)
        with model.nnsight.trace(inputs) as tracer:
            x = model.nnsight[name]
            if way == "assigned":
                model.nnsight[name] = change(x)
            else:
                x.copy_(change(x))
            got = tracer.result.save()
        assert torch.equal(got, by_hook(family, model, inputs, name)), name
        assert changed_by(family, inputs, got) > 0.01, name


def test_what_was_saved_is_not_what_is_assigned(model, inputs):
    with model.nnsight.trace(inputs):
        z = model.nnsight["blocks.1.attn.hook_z"].save()
        model.nnsight["blocks.1.attn.hook_z"] = torch.zeros_like(z)
        out = model.nnsight["blocks.1.hook_attn_out"].save()
    assert z.abs().max() > 0.01 and out.abs().max() == 0  # o_proj has no bias


@pytest.mark.parametrize("way", ["assigned", "in place"])
def test_hook_points_serve_what_nnsight_has_no_place_for(model, family, inputs, way):
    nowhere = [n for n in in_block_one(model, model.hook_dict) if n not in model.nnsight.names]
    seen = {}
    model.run_with_hooks(inputs, fwd_hooks=[(nowhere, lambda x, hook: seen.update({hook.name: x.clone()}))])
    for name in nowhere:
        change = edit(name)
        with model.nnsight.trace(inputs, hooks=name) as tracer:
            x = model.nnsight[name]
            kept = x.clone().save()
            if way == "assigned":
                model.nnsight[name] = change(x)
            else:
                x.copy_(change(x))
            got = tracer.result.save()
        assert torch.equal(kept, seen[name]), name
        assert torch.equal(got, by_hook(family, model, inputs, name)), name
        assert changed_by(family, inputs, got) > 1e-3, name


def test_named_and_unnamed_places_mix_in_one_trace(model, inputs):
    with model.nnsight.trace(inputs, hooks=["blocks.*.attn.hook_pattern"]):
        first = model.nnsight["blocks.0.attn.hook_pattern"].save()
        z = model.nnsight["blocks.0.attn.hook_z"].save()
        model.nnsight["blocks.2.attn.hook_pattern"][:, 1] = 0
        after = model.nnsight["blocks.2.attn.hook_z"].save()
    assert z.shape[2] == first.shape[1] == 4 and after[:, :, 1].abs().max() == 0 < after[:, :, 0].abs().max()


# -- with hooks --------------------------------------------------------------------------------------------------------


def test_hooks_registered_before_or_after_nnsight_are_the_same(family, inputs):
    hooks = [("blocks.1.attn.hook_z", returned("z")), ("vision.blocks.0.hook_resid_post", returned("resid"))]
    expected = HookedMLLM.from_model(fresh(family), check=False).run_with_hooks(inputs, fwd_hooks=hooks)
    model = HookedMLLM.from_model(fresh(family), check=False)
    with model.hooks(fwd_hooks=hooks):
        assert torch.equal(model(inputs), expected)
        with model.nnsight.trace(inputs) as tracer:
            before = tracer.result.save()
    with model.nnsight.trace(inputs) as tracer:
        bare = tracer.result.save()
    with model.hooks(fwd_hooks=hooks), model.nnsight.trace(inputs) as tracer:
        after = tracer.result.save()
    assert torch.equal(before, expected) and torch.equal(after, expected)
    assert torch.equal(bare, plain(family)(**inputs).logits) and changed_by(family, inputs, expected) > 0.01


def test_at_one_module_hooks_are_outside_of_nnsight(model, inputs):
    """Our hook on an input, nnsight there, the module, nnsight on its output, our hook there."""
    out, into = "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"
    with model.hooks(fwd_hooks=[(out, lambda x, hook: x * 3), (into, lambda x, hook: x + 1)]):
        with model.nnsight.trace(inputs):
            z = model.nnsight[into].save()
            mid = model.nnsight["blocks.1.hook_resid_mid"].save()
            mlp = model.nnsight[out].save()
            post = model.nnsight["blocks.1.hook_resid_post"].save()
        _, cache = model.run_with_cache(inputs, [into, out, "blocks.1.hook_resid_mid"])
    assert torch.equal(z, cache[into]) and torch.equal(mlp * 3, cache[out])
    torch.testing.assert_close(post, mid + 3 * mlp)


def test_an_ablation_is_the_same_by_intervention_and_by_trace(model, family):
    sample = model.prepare("What colour is the mug?", images=tiny_image())
    where = sample.mask("question")
    with model.nnsight.trace(sample) as tracer:
        model.nnsight["blocks.1.attn.hook_z"][:, where[0], 2] = 0
        traced = tracer.result.save()
    ablation = HeadAblation(["L1H2"], mode="zero", phase="prefill", positions="question")
    with model.intervene(ablation):
        ablated = model(sample)
        with model.nnsight.trace(sample) as tracer:
            both = tracer.result.save()
    assert torch.equal(traced, ablated) and torch.equal(both, ablated)
    assert changed_by(family, sample.inputs, traced) > 1e-3


def test_a_residual_of_another_run_is_patched_the_same_way(model):
    clean, other = (model.prepare("What colour is the mug?", images=tiny_image(seed=s)) for s in (1, 2))
    name, at = "blocks.1.hook_resid_post", clean.mask("visual")[0]
    with model.nnsight.trace(clean):
        stream = model.nnsight[name].save()
    with model.nnsight.trace(other) as tracer:
        model.nnsight[name][:, at] = stream[:, at]
        traced = tracer.result.save()

    def patch(x, hook):
        x[:, at] = stream[:, at]

    assert torch.equal(traced, model.run_with_hooks(other, fwd_hooks=[(name, patch)]))
    assert not torch.equal(traced, model(other))


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_z", "vision.blocks.1.attn.hook_k", "blocks.1.attn.hook_pattern"])
def test_gradients_reach_what_was_read(model, inputs, name):
    hooks = [name] if name.endswith("pattern") else []
    patches = [("vision.hook_patch_embed", lambda x, hook: x.clone().requires_grad_(True))]
    with torch.enable_grad(), model.hooks(fwd_hooks=patches):
        with model.nnsight.trace(inputs, hooks=hooks):
            x = model.nnsight[name].save()
            loss = model.nnsight["hook_logits"][0, -1].max().save()
        (gradient,) = torch.autograd.grad(loss, x)
    _, cache = model.run_with_cache(inputs, name, incl_bwd=lambda logits: logits[0, -1].max())
    assert gradient.abs().max() > 0
    torch.testing.assert_close(gradient, cache[name + "_grad"], atol=1e-6, rtol=1e-4)


def test_an_edit_may_read_the_same_value_again(model, inputs):
    name = "vision.blocks.1.attn.hook_q"
    with model.nnsight.trace(inputs) as tracer:
        model.nnsight[name][:, :, 1] += model.nnsight[name][:, :, 0]
        got = tracer.result.save()

    def add(q, hook):
        q[:, :, 1] += q[:, :, 0]

    assert torch.equal(got, model.run_with_hooks(inputs, fwd_hooks=[(name, add)]))


def test_nothing_is_left_behind(family, inputs, tmp_path):
    hf = fresh(family)
    model = HookedMLLM.from_model(hf, check=False)
    plain(family)(**inputs)
    weights = {n: p.data_ptr() for n, p in hf.named_parameters()}
    for hooks in ([], ["blocks.1.attn.hook_pattern"]):
        with model.nnsight.trace(inputs, hooks=hooks):
            model.nnsight["blocks.2.attn.hook_z"][:] = 0
        with pytest.raises(ZeroDivisionError):
            with model.nnsight.trace(inputs, hooks=hooks):
                model.nnsight["blocks.1.attn.hook_z"]
                1 / 0
        with model.nnsight.trace(inputs, hooks=hooks) as tracer:
            model.nnsight["blocks.1.attn.hook_z"]
            tracer.stop()
    assert model.nnsight is model.nnsight and model.nnsight._module is hf
    counts = [[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in x.modules()] for x in (hf, plain(family))]
    assert counts[0] == counts[1] and not model.list_hooks()  # transformers has some of its own
    assert hf.config.text_config._attn_implementation == "sdpa" and model.registry.running is None
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)
    assert torch.equal(hf(**inputs).logits, plain(family)(**inputs).logits)
    assert {n: p.data_ptr() for n, p in hf.named_parameters()} == weights
    assert list(hf.state_dict()) == list(plain(family).state_dict())


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_state_what_to_do(model, inputs):
    from nnsight.intervention.interleaver import OutOfOrderError

    z = "blocks.1.attn.hook_z"
    with pytest.raises(HookValueError, match="only while the model runs.*model.nnsight.trace"):
        model.nnsight[z]
    with pytest.raises(HookNameError, match="no hook point 'blocks.9.attn.hook_z'. Did you mean 'blocks"):
        with model.nnsight.trace(inputs):
            model.nnsight["blocks.9.attn.hook_z"]
    name = "blocks.1.attn.hook_pattern"
    message = rf"nnsight has no place.*trace\(inputs, hooks='{name}'\).*cache.pattern.*Did you mean 'blocks.1.attn"
    with pytest.raises(HookNameError, match=message):
        with model.nnsight.trace(inputs):
            model.nnsight[name]
    with pytest.raises(HookNameError, match="no hook point 'hook_pattern'"):
        model.nnsight.trace(inputs, hooks="hook_pattern")
    with pytest.raises(InputError, match="hold no `input_ids`"):
        model.nnsight.trace()
    with pytest.raises(OutOfOrderError):
        with model.nnsight.trace(inputs):
            model.nnsight["blocks.1.attn.hook_z"]
            model.nnsight["blocks.0.attn.hook_z"]


@pytest.mark.parametrize("hooks", [(), "blocks.1.attn.hook_z"], ids=["by module", "by hook point"])
def test_values_that_do_not_fit_are_errors(model, inputs, hooks):
    z = "blocks.1.attn.hook_z"
    for wrong, message in (
        (lambda x: x[:, :, :2], r"was given shape \(1, \d+, 2, 8\), torch.float32, on cpu; expected shape"),
        (lambda x: x.double(), "torch.float64.*expected.*torch.float32"),
        (lambda x: 0.0, "was given float; expected a tensor of"),
    ):
        with pytest.raises(HookValueError, match=message):
            with model.nnsight.trace(inputs, hooks=hooks):
                model.nnsight[z] = wrong(model.nnsight[z])


def test_without_nnsight_the_error_states_what_to_install(family, monkeypatch):
    model = HookedMLLM.from_model(fresh(family), check=False)
    monkeypatch.setitem(sys.modules, "nnsight", None)
    monkeypatch.delitem(sys.modules, "hooked_mllm.model.nnsight_bridge")
    with pytest.raises(InputError, match="pip install 'nnsight>=0.8'"):
        model.nnsight


def test_nnsight_is_imported_by_the_bridge_alone_and_the_bridge_only_on_first_use():
    found = set()
    for path in Path(hooked_mllm.__file__).parent.rglob("*.py"):
        at_import = [n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.Import | ast.ImportFrom)]
        if any("nnsight" in ast.unparse(n) for n in at_import):
            found.add(path.name)
    assert found == {"nnsight_bridge.py"}
