"""Question contrast against patterns reduced by hand."""

import numpy as np
import pytest

from helpers.cache_witness import hooked
from helpers.question_witness import PICTURES, QUESTIONS, best, prepared, visual_rows
from hooked_mllm.metrics import QuestionContrast


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_question_contrast(family, share):
    model, metric = hooked(family), QuestionContrast(share=share).keep_samples()
    samples = prepared(family)
    found = model.measure(metric.groups(model, samples, n=2), metric, progress=False)
    assert found.provenance["shared_prefix"] == {"reused": 3, "whole": 0} and found.provenance["n_samples"] == 3
    for number, picture in enumerate(PICTURES):
        rows = [visual_rows(family, picture, text) for text in QUESTIONS[:3]]
        due = np.mean([best(a - (sum(rows) - a) / 2, share) for a in rows], axis=0)
        np.testing.assert_allclose(metric.sample_scores().values[number], due, atol=1e-5)
    np.testing.assert_allclose(found.values, metric.sample_scores().values.mean(0), atol=1e-12)
    assert found.values.std() > 1e-3
