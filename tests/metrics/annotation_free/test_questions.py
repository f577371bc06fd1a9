"""QuestionContrast and ParaphraseConsistency against NumPy on patterns of plain transformers, each prompt run apart."""

import numpy as np
import pytest
import torch

from helpers.cache_witness import hooked
from helpers.question_witness import PICTURES, QUESTIONS, prepared, wordings
from hooked_mllm import Box, HookedMLLM, SampleBatch
from hooked_mllm.errors import InputError
from hooked_mllm.measuring.shared_prefix import SharedPrefix
from hooked_mllm.metrics import NullQuery, ParaphraseConsistency, QuestionContrast
from hooked_mllm.toys import VisualRetrieval


def test_samples_of_a_batch_get_the_questions_of_single_samples(family):
    model, samples = hooked(family), prepared(family)
    metric = ParaphraseConsistency(wordings=3)

    def inputs(several):
        groups = [*QuestionContrast.groups(model, several, n=2), *metric.groups(model, several, wordings, n=2)]
        return [group.inputs["input_ids"] for group in groups]

    expected = inputs(samples)
    for several in (SampleBatch.collate(samples), [samples[0], SampleBatch.collate(samples[1:])]):
        assert all(torch.equal(a, b) for a, b in zip(inputs(several), expected, strict=True))


def test_questions_are_drawn_by_seed_and_never_ones_own(family):
    model, samples = hooked(family), prepared(family)

    def drawn(**options):
        return [[s.question for s in batch] for batch in QuestionContrast.groups(model, samples, **options)]

    assert drawn(n=2) == drawn(n=2)
    for own, batch in zip(samples, drawn(n=2), strict=True):
        assert batch[0] == own.question and sorted(batch) == sorted(QUESTIONS[:3])
    given = drawn(questions=["so", "so", QUESTIONS[0]], n=1)
    assert given[0] == [QUESTIONS[0], "so"] and given[1][1] in ("so", QUESTIONS[0])
    assert len({str(drawn(questions=[*QUESTIONS, "the", "red"], n=2, seed=seed)) for seed in range(4)}) > 1


def test_targets_are_not_looked_at(family):
    model = hooked(family)
    scores = []
    for target in (None, Box(0, 0, 8, 8), Box(16, 8, 32, 24)):
        metric = QuestionContrast()
        samples = prepared(family, target=target)
        groups = list(metric.groups(model, samples, n=1))
        assert all(s.target_mask is None and s.target is None for batch in groups for s in batch)
        scores.append(model.measure(groups, metric, progress=False).values)
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_left_padded_batches_give_the_same(family):
    model, metric, whole = hooked(family), QuestionContrast(share=0.3), QuestionContrast(share=0.3)
    groups = list(metric.groups(model, prepared(family), n=2))
    shared = model.measure(groups, metric, progress=False)
    plain = model.measure([SampleBatch.collate(batch.samples) for batch in groups], whole, progress=False)
    np.testing.assert_allclose(shared.values, plain.values, atol=1e-5)


def test_bad_input_is_rejected(family):
    model, samples = hooked(family), prepared(family)
    for build in (lambda s: QuestionContrast(share=s), lambda s: ParaphraseConsistency(share=s)):
        for share in (0.0, 1.5, -1):
            with pytest.raises(InputError, match="share must be above 0"):
                build(share)
    with pytest.raises(InputError, match="wordings must be 2"):
        ParaphraseConsistency(wordings=1)
    with pytest.raises(InputError, match="only 2 differ"):
        next(QuestionContrast.groups(model, samples, n=3))
    with pytest.raises(InputError, match="n must be 1"):
        next(QuestionContrast.groups(model, samples, n=0))
    with pytest.raises(InputError, match="Expected 3 different wordings"):
        next(ParaphraseConsistency(wordings=3).groups(model, samples, lambda q: [q, q, "so"], n=1))
    with pytest.raises(InputError, match="without answer="):
        next(QuestionContrast.groups(model, prepared(family, answer="red"), n=1))
    with pytest.raises(InputError, match="Expected samples.*got dict"):
        next(QuestionContrast.groups(model, [samples[0].inputs], n=1))
    with pytest.raises(InputError, match="needs two questions"):
        model.measure(samples[0], QuestionContrast(), progress=False)
    with pytest.raises(InputError, match="differ before their questions"):
        odd = model.prepare("so", images=PICTURES[:2])
        model.measure(SampleBatch.collate([samples[0], odd]), QuestionContrast(), progress=False)
    three = SampleBatch.collate([samples[0], *(NullQuery(t).sample(model, samples[0]) for t in ("so", "red"))])
    with pytest.raises(InputError, match="two questions at least, 2 wordings each; the batch holds 3"):
        model.measure(three, ParaphraseConsistency(), progress=False)


def test_a_head_that_ignores_the_question_scores_nothing(family):
    model, sample = hooked(family), prepared(family)[0]
    with model.hooks([("blocks.1.attn.hook_rot_q", lambda q, hook: torch.zeros_like(q))]):
        # as many tokens, so that even attention is the same
        other = NullQuery("What colour is the dog?").sample(model, sample)
        scores = model.measure(SharedPrefix.collate([sample, other]), QuestionContrast(share=1.0), progress=False)
    assert scores.values[1].abs().max() < 1e-6 < scores.values[2].min()


def test_planted_heads_are_found_without_a_target():
    model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", check=False)
    samples = VisualRetrieval(seed=7, pages=2).samples(model, 6)
    metric = QuestionContrast()
    scores = model.measure(metric.groups(model, samples, n=2), metric, progress=False)
    assert set(scores.top(4)) == {(2, 4), (2, 5), (2, 6), (2, 7)}
