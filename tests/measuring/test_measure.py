"""`measure` against patterns reduced by hand, in any grouping of layers, and what cannot be measured."""

import math

import pytest
import torch

import hooked_mllm.measuring.attention_rows as rows_module
from helpers.cache_witness import batch, close, film, hooked, sample, text_sample
from helpers.measured import FirstToken, four, no_taps, run
from helpers.tiny import tiny_image, tiny_model
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import InputError, LayoutError, NumericsError
from hooked_mllm.measuring.measure import measure, named_queries
from hooked_mllm.metrics import HeadMetric, KeyTokenRatio, RetrievalAttentionMass, VisionMass


class Entropy(HeadMetric):
    """A user's metric of whole rows."""

    def score(self, view):
        rows = view.rows("question", reduce=lambda rows: -(rows * rows.clamp(min=1e-30).log()).sum(-1))
        return view.average(rows, "question")


def profiles(family, inputs, queries="question") -> torch.Tensor:
    """[layer head key] of one sample, the mean row over its queries, from its cached patterns."""
    _, cache = hooked(family).run_with_cache(inputs, "blocks.*hook_pattern")
    mask = inputs.mask(queries)[0]
    return torch.stack([cache["pattern", i][0][:, mask].double().mean(1) for i in range(3)])


def by_hand(family, samples, queries="question", keys="target") -> torch.Tensor:
    each = [profiles(family, s, queries)[..., s.mask(keys)[0]].sum(-1) for s in samples]
    return torch.stack(each).mean(0)


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_scores_are_those_of_cached_patterns(family):
    samples = four(family)
    ram, mass, last, sink, entropy = run(
        family, samples, [RetrievalAttentionMass(), VisionMass(), VisionMass(queries="last"), FirstToken(), Entropy()]
    )
    close(ram.values, by_hand(family, samples))
    close(mass.values, by_hand(family, samples, keys="visual"))
    close(last.values, by_hand(family, samples, queries="last", keys="visual"))
    close(sink.values, torch.stack([profiles(family, s)[..., 0] for s in samples]).mean(0))
    assert 0 < entropy.values.min() and entropy.values.max() < math.log(max(map(len, samples)))
    assert (ram.counts == 4).all() and sink.name == "FirstToken"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_counts_as_its_samples(family, side):
    metrics = lambda: [RetrievalAttentionMass(), KeyTokenRatio(share=0.2), Entropy()]  # noqa: E731
    together = run(family, batch(family, side), metrics())
    alone = run(family, list(batch(family, side)), metrics())
    for a, b in zip(together, alone, strict=True):
        close(a.values, b.values)
        assert torch.equal(a.counts, b.counts)


def test_layers_in_groups_of_any_size_give_the_same(family):
    expected = run(family, [film(family), sample(family)], VisionMass())
    for group_bytes in (1, 1 << 14, 1 << 40):
        scores = measure(
            hooked(family), [film(family), sample(family)], VisionMass(), progress=False, group_bytes=group_bytes
        )
        close(scores.values, expected.values, 1e-7)


def test_metrics_share_the_attention_rows(family, monkeypatch):
    calls = []
    own = rows_module.attention_rows

    def counting(*args, **kwargs):
        calls.append(args[0].shape)
        return own(*args, **kwargs)

    monkeypatch.setattr(rows_module, "attention_rows", counting)
    run(family, sample(family), RetrievalAttentionMass())
    one = len(calls)
    run(family, sample(family), [RetrievalAttentionMass(), VisionMass(), KeyTokenRatio(), FirstToken()])
    assert len(calls) == 2 * one and one == 1
    n = int(sample(family).mask("question").sum())
    assert calls[0] == (3, 1, 4, n, 8)


def test_only_the_rows_of_queries_that_all_metrics_name_are_kept(family):
    ram, last = RetrievalAttentionMass(), VisionMass(queries="last")
    assert named_queries([ram, last, ram]) == ("question", "last")
    assert named_queries([ram, FirstToken()]) is None
    found = run(family, [sample(family), batch(family, "left")], [ram, last])
    samples = [sample(family), *batch(family, "left")]
    close(found[0].values, by_hand(family, samples))
    close(found[1].values, by_hand(family, samples, "last", "visual"))
    reads_more = FirstToken()
    reads_more.queries = "last"
    with pytest.raises(InputError, match="rows of the 'question' query tokens were not kept"):
        run(family, sample(family), reads_more)
    reads_more.queries = ("last", "question")
    close(run(family, sample(family), reads_more).values, run(family, sample(family), FirstToken()).values)
    assert no_taps(family)


def test_no_logits_are_computed_and_the_attention_stays_its_own(family):
    def never(x, hook):
        raise AssertionError("logits were computed")

    model = hooked(family)
    expected = run(family, sample(family), VisionMass())
    with model.hooks([("hook_logits", never)]):
        assert torch.equal(run(family, sample(family), VisionMass()).values, expected.values)
    with model.attention("eager"):
        close(run(family, sample(family), VisionMass()).values, expected.values)
    assert no_taps(family)


def test_registered_hooks_act_on_what_is_measured(family):
    model = hooked(family)
    before = run(family, sample(family), VisionMass()).values
    with model.hooks([("blocks.1.attn.hook_z", lambda z, hook: z * 0)]):
        after = run(family, sample(family), VisionMass()).values
        _, cache = model.run_with_cache(sample(family), "blocks.*hook_pattern")
    assert torch.equal(before[:2], after[:2]) and not torch.allclose(before[2], after[2], atol=1e-3)
    rows = cache["pattern", 2][0][:, sample(family).mask("question")[0]]
    close(after[2], rows[..., sample(family).mask("visual")[0]].sum(-1).mean(-1))


def test_a_generator_of_samples_is_run_as_it_comes(family):
    model, made = hooked(family), []

    def samples():
        for s in four(family):
            made.append(s)
            yield s

    class Eager(FirstToken):
        def score(self, view):
            assert len(made) == seen[0] + 1
            seen[0] += view.is_last
            return super().score(view)

    seen = [0]
    scores = model.measure(samples(), Eager(), progress=False)
    close(scores.values, run(family, four(family), FirstToken()).values, 1e-12)


def test_bare_model_inputs_have_the_last_position_and_the_visual_ones(family):
    expected = run(family, [sample(family), film(family)], VisionMass(queries="text"))
    scores = run(family, [dict(sample(family).inputs), dict(film(family).inputs)], VisionMass(queries="text"))
    close(scores.values, expected.values)
    assert "sample_ids" not in scores.provenance
    run(family, dict(sample(family).inputs), VisionMass(queries="last"))
    with pytest.raises(LayoutError, match="model.prepare"):
        run(family, dict(sample(family).inputs), VisionMass())


def test_a_result_has_its_provenance(family):
    scores = run(family, [*four(family)[:2], batch(family)], RetrievalAttentionMass())
    facts = scores.provenance
    assert facts["sample_ids"] == ["sample-0", "sample-1"] and facts["n_samples"] == 4
    assert facts["templates"] == [sample(family).template]
    assert (
        facts["family"] == hooked(family).family.name and facts["attention"] == "sdpa" and facts["dtype"] == "float32"
    )


# -- what cannot be measured -----------------------------------------------------------------------------------------


def test_nothing_to_measure(family):
    for nothing in ([], iter([])):
        with pytest.raises(InputError, match="empty"):
            run(family, nothing, VisionMass())
    for wrong in (iter(["a text"]), iter([sample(family), None])):
        with pytest.raises(InputError, match=r"for sample \d; got (str|NoneType)\. `model\.prepare"):
            run(family, wrong, VisionMass())
    for wrong in ([], [VisionMass], VisionMass):
        with pytest.raises(InputError, match=r"Expected a metric or several"):
            run(family, sample(family), wrong)


def test_a_metric_that_needs_what_a_sample_lacks(family):
    without = hooked(family).prepare("What colour is the mug?", images=tiny_image(), id="bare")
    ram = RetrievalAttentionMass()
    with pytest.raises(InputError, match=r"'bare' has no target"):
        run(family, [sample(family), without], ram)
    with pytest.raises(LayoutError, match="no image"):
        run(family, text_sample(family), VisionMass())
    assert no_taps(family)
    assert (ram.count == 1).all()  # the sample before it is in, no half of this one


def test_attention_that_is_not_finite_is_named_and_leaves_no_tap(family):
    model = hooked(family)

    def spoil(q, hook):
        q[:] = float("nan")

    with model.hooks([("blocks.1.attn.hook_rot_q", spoil)]), pytest.raises(NumericsError, match="L1H0"):
        run(family, sample(family), VisionMass(queries="text"))
    assert no_taps(family)
    run(family, sample(family), VisionMass())


def test_float16_that_overflows_is_named(family):
    hf_model = tiny_model(family, dtype=torch.float16).requires_grad_(False)
    hf_model.model.language_model.layers[0].mlp.down_proj.weight.mul_(3e4)
    model = HookedMLLM.from_model(hf_model, check=False)
    with pytest.raises(NumericsError, match=r"L[12]H.*bfloat16"):
        model.measure(sample(family).to(dtype=torch.float16), VisionMass(), progress=False)
    assert not any(site.taps for site in model.wiring.text)


def test_progress_is_shown_only_if_it_is_on(capsys):
    run("qwen3_vl", sample("qwen3_vl"), VisionMass())
    assert capsys.readouterr() == ("", "")
    hooked("qwen3_vl").measure([sample("qwen3_vl")], VisionMass())
    assert "1/1" in capsys.readouterr().err


@pytest.mark.parametrize("save_every", [0, -1])
def test_save_every_is_at_least_1(tmp_path, family, save_every):
    with pytest.raises(InputError, match=f"save_every is a number of samples, at least 1; got {save_every}"):
        hooked(family).measure(sample(family), VisionMass(), checkpoint=tmp_path / "state", save_every=save_every)
    assert not list(tmp_path.iterdir())
