"""The sweep engine against a whole forward pass for each variant."""

import pytest
import torch

from helpers.intervention_witness import GREEDY, batch, o_proj, sample
from helpers.tiny import ALL_FAMILIES, FAMILIES, HEAD_DIM, HEADS
from helpers.wrapped import LAYERS, plain, wrapped
from hooked_mllm import ActivationPatch, AttentionKnockout, HeadAblation, HeadPatch, Steer
from hooked_mllm.errors import HeadError, HookValueError, InputError, NumericsError
from hooked_mllm.objectives import FunctionObjective, KLDivergence, LogitDifference
from hooked_mllm.sweep import Sweep

DIFFERENCE = LogitDifference(5, wrong=[9, 11])


def every_head(**how):
    how = {"mode": "zero", "phase": "prefill", **how}
    return [HeadAblation([(layer, head)], **how) for layer in range(LAYERS) for head in range(HEADS)]


def in_a_loop(model, inputs, variants, score):
    """`score(logits at the last prompt position [batch d_vocab])` of a whole forward pass for each variant."""
    last = inputs.mask("last")
    values = []
    for variant in variants:
        with model.intervene(*(variant if isinstance(variant, tuple) else (variant,))), torch.no_grad():
            values.append(score(model(inputs)[last]).double())
    return torch.stack(values)


def difference(logits):
    return logits[:, 5] - (logits[:, 9] + logits[:, 11]) / 2


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_each_head_against_a_torch_hook_on_the_plain_model(family):
    inputs, model = sample(family), plain(family)
    got = Sweep(wrapped(family), inputs, DIFFERENCE).run(every_head())
    expected = []
    for layer in range(LAYERS):
        for head in range(HEADS):

            def zero(_, args, head=head):
                z = args[0].clone()
                z[..., head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
                return (z,)

            handle = o_proj(model, layer).register_forward_pre_hook(zero)
            with torch.no_grad():
                expected.append(difference(model(**inputs.inputs, use_cache=False).logits[:, -1]))
            handle.remove()
    assert torch.allclose(got, torch.stack(expected).double(), atol=1e-5)
    assert got.std() > 1e-3, "all heads have the same effect"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [None, 1, 3])
def test_a_batch_of_unequal_samples(family, side, size):
    model, inputs = wrapped(family), batch(family, side)
    variants = every_head()
    got = Sweep(model, inputs, DIFFERENCE, batch_size=size).run(variants)
    assert got.shape == (LAYERS * HEADS, 2)
    assert torch.allclose(got, in_a_loop(model, inputs, variants, difference), atol=1e-5)


def variants_at_all_sites(model, inputs):
    """Variants at every kind of site, of one or two interventions, inside and outside the blocks."""
    _, cache = model.run_with_cache(inputs)
    other = {name: value.roll(1, -1) for name, value in cache.items() if name.endswith(("resid_mid", "mlp_out"))}
    mean = HeadAblation.reference(model, inputs, [(1, 2)])
    yield from (
        HeadAblation([(1, 2)], mode="mean", phase="prefill", reference=mean),
        HeadAblation([(0, 1), (2, 3)], mode="scale", factor=3.0, phase="both"),
        HeadAblation([(1, 0)], mode="uniform", phase="prefill"),
        AttentionKnockout([(1, 1)], queries="question", keys="visual", phase="prefill"),
        AttentionKnockout(layers=1, queries="last", keys="visual", phase="prefill"),
        ActivationPatch("resid_mid", {1: other["blocks.1.hook_resid_mid"]}, positions="question"),
        ActivationPatch("mlp_out", {2: other["blocks.2.hook_mlp_out"]}, positions=-1),
        ActivationPatch("v", {1: cache["v", 1].roll(1, -1)}, heads=1),
        ActivationPatch("vision.hook_out", cache["vision.hook_out"].roll(1, -1)),
        ActivationPatch("ln_final.hook_normalized", cache["ln_final.hook_normalized"].roll(1, -1)),
        Steer(torch.linspace(-1, 1, model.cfg.d_model), layer=1, positions="visual"),
        (HeadAblation("L2H0", mode="zero", phase="prefill"), HeadAblation("L0H3", mode="zero", phase="prefill")),
        HeadPatch([(1, 3)], cache["z", 1] * 2),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_variant(family):
    model, inputs = wrapped(family), batch(family)
    variants = list(variants_at_all_sites(model, inputs))
    got = Sweep(model, inputs, DIFFERENCE).run(variants)
    expected = in_a_loop(model, inputs, variants, difference)
    assert torch.allclose(got, expected, atol=1e-5)
    clean = in_a_loop(model, inputs, [()], difference)
    assert bool(((got - clean).abs() > 1e-5).any(1).all()), "a variant did nothing"


def test_deepstack_patched_in_a_sweep():
    model, inputs = wrapped("qwen3_vl"), sample("qwen3_vl")
    _, cache = model.run_with_cache(inputs, "*hook_deepstack")
    variants = [ActivationPatch("deepstack", {layer: cache["deepstack", layer] * 2}) for layer in range(2)]
    got = Sweep(model, inputs, DIFFERENCE).run(variants)
    assert torch.allclose(got, in_a_loop(model, inputs, variants, difference), atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_only_late_positions_are_computed(family, side, attention, monkeypatch):
    model, inputs = wrapped(family, attention), batch(family, side)
    variants = [v for i, where in enumerate(("last", "question", "visual")) for v in every_head(positions=where)[i::3]]
    sweep = Sweep(model, inputs, DIFFERENCE)
    calls, resume = [], sweep.trunk.resume

    def recorded(layer, residual, stop=None, first=0):
        calls.append((residual.shape[1], first))
        return resume(layer, residual, stop, first)

    monkeypatch.setattr(sweep.trunk, "resume", recorded)
    got = sweep.run(variants)
    assert torch.allclose(got, in_a_loop(model, inputs, variants, difference), atol=1e-5)
    length = inputs.inputs["input_ids"].shape[1]
    assert all(positions + first == length for positions, first in calls)
    assert min(positions for positions, _ in calls) < length / 2, "the whole sequence was run again"


@pytest.mark.parametrize("where", ["hook_pattern", "hook_z"])
def test_registered_hooks_apply_to_every_run(where):
    model, inputs = wrapped("qwen3_vl"), sample("qwen3_vl")
    variants = [*every_head(positions="last")[:6], Steer(torch.ones(model.cfg.d_model), layer=2, positions="last")]
    hooks = [
        (f"blocks.1.attn.{where}", lambda x, hook: x * 0.5),
        ("blocks.2.hook_resid_pre", lambda x, hook: x.mul_(1.1)),
    ]
    with model.hooks(fwd_hooks=hooks):
        got = Sweep(model, inputs, DIFFERENCE).run(variants)
        expected = in_a_loop(model, inputs, variants, difference)
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, Sweep(model, inputs, DIFFERENCE).run(variants), atol=1e-3)


def test_an_active_intervention_keeps_its_positions():
    model, inputs = wrapped("llava_onevision"), batch("llava_onevision")
    outer = HeadAblation([(2, 1)], mode="zero", phase="prefill", positions="question")
    with model.intervene(outer):
        got = Sweep(model, inputs, DIFFERENCE, batch_size=4).run(every_head())
        assert torch.allclose(got, in_a_loop(model, inputs, every_head(), difference), atol=1e-5)


def test_kl_compares_with_the_clean_run():
    model, inputs = wrapped("internvl"), sample("internvl")
    sweep = Sweep(model, inputs, KLDivergence())
    got = sweep.run(every_head())
    with torch.no_grad():
        p = model(inputs)[:, -1].double().log_softmax(-1)
    expected = in_a_loop(model, inputs, every_head(), lambda x: (p.exp() * (p - x.double().log_softmax(-1))).sum(-1))
    assert sweep.clean.abs().max() < 1e-6
    assert torch.allclose(got, expected, atol=1e-6)


def test_the_model_is_unchanged_after_an_error():
    model, inputs = wrapped("qwen3_vl"), sample("qwen3_vl")
    before = model(inputs)
    sweep = Sweep(model, inputs, DIFFERENCE)

    def stop(numbers, values):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run(every_head(positions="last"), done=stop)
    assert model.list_hooks() == {}
    assert not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.hf_model.modules() if "Decoder" in type(m).__name__
    )
    assert torch.equal(before, model(inputs))
    assert torch.equal(model.generate(inputs, **GREEDY), plain("qwen3_vl").generate(**inputs.inputs, **GREEDY))


def test_skipped_variants_are_nan_and_done_is_called_after_each_batch():
    model, inputs, values = wrapped("internvl"), sample("internvl"), {}
    sweep = Sweep(model, inputs, DIFFERENCE, batch_size=3)
    whole = sweep.run(every_head())
    part = sweep.run(
        every_head(), skip=lambda n: n % 3 == 0, done=lambda n, v: values.update(zip(n, v.tolist(), strict=True))
    )
    skipped = torch.arange(len(whole)) % 3 == 0
    assert bool(part[skipped].isnan().all()) and torch.allclose(part[~skipped], whole[~skipped], atol=1e-6)
    assert sorted(values) == (~skipped).nonzero().flatten().tolist()
    assert all(values[n] == part[n].tolist() for n in values)


def test_residual_streams_can_be_kept_on_another_device():
    model, inputs = wrapped("qwen3_vl"), sample("qwen3_vl")
    on_cpu, on_device = (Sweep(model, inputs, DIFFERENCE, offload=where) for where in ("cpu", "device"))
    assert torch.equal(on_cpu.run(every_head()), on_device.run(every_head()))
    with pytest.raises(HookValueError, match="offload"):
        Sweep(model, inputs, DIFFERENCE, offload="disk")


def test_compiled_blocks_have_the_same_values():
    model, inputs = wrapped("qwen3_vl"), sample("qwen3_vl")
    calls, compile_ = [], torch.compile
    sweep = Sweep(model, inputs, DIFFERENCE, compile=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **how: calls.append(f) or compile_(f, backend="eager", **how))
        got = sweep.run(every_head())
    blocks = model.hf_model.model.language_model.layers
    assert calls and all(any(c is b for b in blocks) for c in calls)
    assert torch.allclose(got, Sweep(model, inputs, DIFFERENCE).run(every_head()), atol=1e-5)


def test_bad_variants_raise_before_anything_runs():
    model, inputs = wrapped("qwen3_vl"), sample("qwen3_vl")
    sweep = Sweep(model, inputs, DIFFERENCE)
    with pytest.raises(HeadError):
        sweep.run([HeadAblation([(LAYERS, 0)], mode="zero", phase="both")])
    with pytest.raises(HookValueError, match="intervention"):
        sweep.run([lambda z, hook: z])
    with pytest.raises(HookValueError, match="batch_size"):
        Sweep(model, inputs, DIFFERENCE, batch_size=0)
    with pytest.raises(InputError):
        Sweep(model, inputs, LogitDifference(10**9, wrong=1))


def test_an_objective_that_is_not_finite_raises():
    model, inputs = wrapped("qwen3_vl"), sample("qwen3_vl")
    nan = FunctionObjective(lambda logits: logits[:, 0, 0] / (logits[:, 0, 0] * 0))
    with pytest.raises(NumericsError, match="without any variant"):
        Sweep(model, inputs, nan)
    late = ActivationPatch("resid_post", torch.full((1, len(inputs), model.cfg.d_model), torch.inf), layers=1)
    with pytest.raises(NumericsError, match="ActivationPatch"):
        Sweep(model, inputs, DIFFERENCE).run([late])
