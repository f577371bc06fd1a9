"""Prompts that share all before their question: what was run once equals what plain transformers makes of each."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.cache_witness import QUESTIONS, attentions, film, hooked, sample
from helpers.tiny import tiny_image
from hooked_mllm import Box, HeadAblation, SampleBatch
from hooked_mllm.errors import InputError
from hooked_mllm.layout import Kind
from hooked_mllm.measuring.shared_prefix import SharedPrefix, reasons_to_run_whole
from hooked_mllm.metrics import HeadMetric, KeyTokenRatio, MMRetHeads, NullQuery, QRHead, RetrievalAttentionMass

TOLERANCE = 1e-5  # float32; the suffix alone goes through other matrix shapes


class Rows(HeadMetric):
    """Keeps the attention rows that it reads."""

    def __init__(self, queries="question", stated="same"):
        super().__init__()
        self.row_queries = queries
        if stated is not None:
            self.queries = queries if stated == "same" else stated
        self.kept = []

    def score(self, view):
        rows = view.rows(self.row_queries)
        at, valid = view.positions(self.row_queries)
        for number in range(view.batch):
            real = ~view.mask("padding")[number]
            self.kept.append(
                (view.layers, number, at[number][valid[number]], rows[:, number, :, valid[number]][..., real])
            )
        return rows.sum((-1, -2))


def plain_sample(family, number=0):
    return sample(family, number, answer=None)


@pytest.fixture
def lengths(family, monkeypatch):
    """How many tokens the language model is run on, call by call; not by a hook, which would be in the way."""
    language_model = hooked(family).hf_model.model.language_model
    own, seen = language_model.forward, []

    def counted(*args, **kwargs):
        seen.append(tuple(kwargs["inputs_embeds"].shape[:2]))
        return own(*args, **kwargs)

    monkeypatch.setattr(language_model, "forward", counted)
    return seen


def compare(metric, family, samples):
    assert {number for _, number, _, _ in metric.kept} == set(range(len(samples)))
    for layers, number, at, rows in metric.kept:
        pattern = attentions(family, samples[number].inputs)
        for layer, found in zip(layers, rows, strict=True):
            due = pattern[layer][0][:, at]
            np.testing.assert_allclose(found.numpy(), due.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("queries", ["question", "last"])
def test_rows_are_those_of_each_prompt_run_alone(family, lengths, queries):
    model, one = hooked(family), plain_sample(family)
    pair = next(NullQuery().pairs(model, one))
    metric = Rows(queries)
    result = model.measure(pair, metric, progress=False)
    null = pair[1]
    prefix = one.layout.spans("question")[0][0]
    assert pair.prefix == prefix > 0.5 * len(one)
    assert lengths == [(1, len(one)), (1, len(null) - prefix)]
    assert result.provenance["shared_prefix"] == {"reused": 1, "whole": 0}
    compare(metric, family, [one, null])


def test_several_questions_behind_pictures_and_a_film(family, lengths):
    model, one = hooked(family), film(family)
    first = replace(NullQuery(QUESTIONS[0]).sample(model, one), id="first")
    group = [first, *(NullQuery(text).sample(model, first) for text in ("so", QUESTIONS[1], "the dog is red"))]
    batch = SharedPrefix.collate(group)
    metric = Rows()
    model.measure(batch, metric, progress=False)
    assert [n for n, _ in lengths] == [1, 1, 1, 1]
    assert sum(n for _, n in lengths) == batch.prefix + sum(len(s) - batch.prefix for s in group)
    compare(metric, family, group)


def test_scores_are_those_of_whole_runs(family):
    model = hooked(family)
    samples = [plain_sample(family, 0), plain_sample(family, 1)]

    def scores(null):
        metrics = [MMRetHeads(), QRHead(), MMRetHeads(queries="last")]
        return model.measure(null.pairs(model, samples), metrics, progress=False)

    for found, whole in zip(scores(NullQuery()), scores(NullQuery(reuse_prefix=False)), strict=True):
        assert found.provenance["shared_prefix"] == {"reused": 2, "whole": 0}
        assert "shared_prefix" not in whole.provenance
        np.testing.assert_allclose(found.values, whole.values, atol=TOLERANCE)
        np.testing.assert_allclose(found.provenance["chance"], whole.provenance["chance"], atol=1e-7)


def test_top_keys_and_half_precision(family):
    model, one = hooked(family, "sdpa", torch.bfloat16), plain_sample(family)
    pair = next(NullQuery().pairs(model, one))
    both = [RetrievalAttentionMass(), KeyTokenRatio()]
    mass, ratio = model.measure(pair, both, progress=False)
    both_again = [RetrievalAttentionMass(), KeyTokenRatio()]
    whole_mass, _ = model.measure(SampleBatch.collate(pair.samples), both_again, progress=False)
    np.testing.assert_allclose(mass.values, whole_mass.values, atol=0.02)
    assert ratio.values.max() <= 1.0 and mass.provenance["shared_prefix"]["reused"] == 1


def fallback(family, metric=None, batch=None):
    """The reasons named, and that the result equals that of the plain batch."""
    model = hooked(family)
    batch = batch or next(NullQuery().pairs(model, plain_sample(family)))
    metric = metric or MMRetHeads()
    reasons = reasons_to_run_whole(model, batch, [metric])
    found = model.measure(batch, metric, progress=False)
    assert found.provenance["shared_prefix"] == {"reused": 0, "whole": 1}
    again = type(metric)(**metric.config())
    whole = model.measure(SampleBatch.collate(batch.samples, batch.padding_side), again, progress=False)
    np.testing.assert_allclose(found.values, whole.values, atol=TOLERANCE)
    return reasons, found


def test_interventions_act_on_both_prompts(family):
    model = hooked(family)
    batch = next(NullQuery().pairs(model, plain_sample(family)))
    bare = model.measure(batch, MMRetHeads(), progress=False)
    with model.intervene(HeadAblation(["L0H0", "L0H1"], mode="zero", phase="both")):
        reasons, edited = fallback(family)
    assert reasons == ["hooks or interventions are registered on the model"]
    assert (edited.values[1:] - bare.values[1:]).abs().max() > 1e-3


def test_hooks_by_position_backends_and_torch_hooks_run_whole(family):
    model = hooked(family)

    def shift(x, hook):
        return x + torch.arange(x.shape[1])[None, :, None] * 0.01  # means something else in a suffix alone

    with model.hooks([("blocks.0.hook_resid_pre", shift)]):
        assert fallback(family)[0] == ["hooks or interventions are registered on the model"]

    def scaled(q, k, v, mask, scale, layer):
        index = torch.arange(q.shape[2]).expand(len(q), -1)
        own = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask.rows(index)[:, None], scale=scale, enable_gqa=True
        )
        return 0.5 * own.transpose(1, 2)

    with model.attention(scaled):
        assert fallback(family)[0] == ["an attention backend or a tap is in use"]
    handle = model.hf_model.model.language_model.layers[0].register_forward_hook(lambda m, a, out: out)
    try:
        assert fallback(family)[0] == ["torch hooks are registered on the model"]
    finally:
        handle.remove()
    model.hf_model.train()
    try:
        assert fallback(family)[0] == ["the model is in training mode"]
    finally:
        model.hf_model.eval()
    assert not reasons_to_run_whole(model, next(NullQuery().pairs(model, plain_sample(family))), [MMRetHeads()])


def test_hooks_of_transformers_itself_are_no_reason(family):
    model = hooked(family)
    model.hf_model(**plain_sample(family).inputs, output_hidden_states=True)
    assert not reasons_to_run_whole(model, next(NullQuery().pairs(model, plain_sample(family))), [MMRetHeads()])


def test_metrics_that_read_the_prefix_run_whole(family):
    reasons, _ = fallback(family, MMRetHeads(queries="text"))
    assert reasons == ["MMRetHeads(queries='text') reads rows of 'text', some of which are before the question"]
    model = hooked(family)
    pair = next(NullQuery().pairs(model, plain_sample(family)))
    unstated = Rows("text", stated=None)
    model.measure(pair, unstated, progress=False)
    compare(unstated, family, pair.samples)
    wrongly_stated = Rows("text", stated="question")
    with pytest.raises(InputError, match="'text' query tokens lie before position"):
        model.measure(pair, wrongly_stated, progress=False)
    assert not any(site.taps for site in model.wiring.text)
    sink = Rows()
    sink.needs_residual = True
    assert "may read rows before" in reasons_to_run_whole(model, pair, [sink])[0]


def test_what_shares_no_prefix_runs_whole(family):
    model, one = hooked(family), plain_sample(family)
    null = NullQuery().sample(model, one)
    none = "the samples share no prefix before their questions"
    left = SharedPrefix.collate([one, null], padding_side="left")
    assert left.prefix == 0 and fallback(family, batch=left)[0] == [none]
    other_picture = model.prepare("N/A", images=tiny_image(32, 24, seed=99), target=Box(0, 0, 16, 16))
    assert SharedPrefix.collate([one, other_picture]).prefix == 0
    assert fallback(family, RetrievalAttentionMass(), SharedPrefix.collate([one, other_picture]))[0] == [none]
    # a question before the picture leaves visual tokens behind it
    kinds = one.layout.kinds.clone()
    kinds[0] = Kind.QUESTION
    asked_first = replace(one, layout=replace(one.layout, kinds=kinds))
    assert SharedPrefix.collate([asked_first, null]).prefix == 0
    kinds[0], kinds[1] = one.layout.kinds[0], Kind.QUESTION
    assert SharedPrefix.collate([replace(one, layout=replace(one.layout, kinds=kinds)), null]).prefix == 0


def test_a_shared_first_word_is_run_for_each(family):
    model, one = hooked(family), plain_sample(family)  # "What colour is the mug?"
    alike = NullQuery("What is the mug").sample(model, one)
    batch = SharedPrefix.collate([one, alike])
    assert batch.prefix == one.layout.spans("question")[0][0]
    assert torch.equal(one.inputs["input_ids"][0, : batch.prefix + 1], alike.inputs["input_ids"][0, : batch.prefix + 1])
    metric = Rows()
    model.measure(batch, metric, progress=False)
    compare(metric, family, [one, alike])


def test_a_resumed_measurement_takes_up_the_same_pairs(family, tmp_path):
    model, samples = hooked(family), [plain_sample(family, 0), plain_sample(family, 1)]
    pairs = list(NullQuery().pairs(model, samples))
    path = tmp_path / "state.safetensors"
    model.measure(pairs[:1], MMRetHeads(), checkpoint=path, progress=False)
    resumed = model.measure(pairs, MMRetHeads(), checkpoint=path, progress=False)
    whole = model.measure(pairs, MMRetHeads(), progress=False)
    assert torch.equal(resumed.values, whole.values)
    assert resumed.provenance["shared_prefix"] == {"reused": 1, "whole": 0}


def test_samples_of_a_batch_are_paired_like_samples_by_themselves(family):
    model, samples = hooked(family), [plain_sample(family, 0), plain_sample(family, 1)]
    expected = list(NullQuery().pairs(model, samples))
    for several in (SampleBatch.collate(samples), [SampleBatch.collate(samples)], iter(samples)):
        for pair, other in zip(NullQuery().pairs(model, several), expected, strict=True):
            assert torch.equal(pair.inputs["input_ids"], other.inputs["input_ids"]) and pair.prefix == other.prefix
    with pytest.raises(InputError, match="Expected samples.*got dict"):
        next(NullQuery().pairs(model, samples[0].inputs))
