"""Paraphrase consistency against patterns reduced by hand."""

import numpy as np

from helpers.cache_witness import hooked
from helpers.question_witness import PICTURES, QUESTIONS, best, prepared, visual_rows, wordings
from hooked_mllm.metrics import ParaphraseConsistency


def test_paraphrase_consistency(family):
    share = 0.3
    model, metric = hooked(family), ParaphraseConsistency(wordings=3, share=share)
    samples = prepared(family)
    found = model.measure(metric.groups(model, samples, wordings, n=2), metric, progress=False)
    due = []
    for picture in PICTURES:
        rows = [[visual_rows(family, picture, w) for w in wordings(text)] for text in QUESTIONS[:3]]
        for x in range(3):
            others = [np.mean(rows[y], axis=0) for y in range(3) if y != x]
            due.append(best(np.min(rows[x], axis=0) - np.mean(others, axis=0), share))
    np.testing.assert_allclose(found.values, np.mean(due, axis=0), atol=1e-5)


def test_paraphrases_of_one_question_are_never_contrasted(family):
    model = hooked(family)
    texts = ("What colour is the mug?", "so What colour is the mug?", "Is the star red?")
    samples = [model.prepare(t, images=PICTURES[0]) for t in texts]
    same = {t: [texts[0], texts[1]] for t in texts[:2]} | {texts[2]: [texts[2], "so"]}
    metric = ParaphraseConsistency(wordings=2)
    for batch in metric.groups(model, samples, same.__getitem__, n=1):
        assert {s.question for s in batch.samples[:2]} ^ {s.question for s in batch.samples[2:]} == {*texts, "so"}
