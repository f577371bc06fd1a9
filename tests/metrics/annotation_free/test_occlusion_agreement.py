"""Occlusions of visual features against a run by hand."""

import numpy as np
import pytest

from helpers.cache_witness import hooked
from helpers.evidence_witness import forced, likely, prepared, reset
from hooked_mllm.metrics import OcclusionAgreement


@pytest.mark.parametrize(("n_tokens", "window", "refine"), [(1, None, 1), (2, 5, 2)])
def test_occlusions(family, n_tokens, window, refine):
    sample = prepared(family)
    reset(family)
    inputs, answer = forced(family, sample, n_tokens)
    count = int(sample.mask("visual").sum())
    width = window or int(np.ceil(np.sqrt(count)))
    windows = [list(range(i, min(i + width, count))) for i in range(0, count, width)]
    clean = likely(family, inputs, answer, [])
    coarse = [clean - likely(family, inputs, answer, at) for at in windows]
    tried = [w for w in np.argsort(coarse)[::-1][:refine] if coarse[w] > 0]
    due = np.zeros(count)
    for j in (j for w in tried for j in windows[w]):
        due[j] = max(clean - likely(family, inputs, answer, [j]), 0)
    agreement = OcclusionAgreement(window=window, refine=refine, batch_size=3, n_tokens=n_tokens)
    weights = agreement.weights(hooked(family), sample)
    visual = sample.mask("visual")[0]
    np.testing.assert_allclose(weights[visual], due / due.sum(), atol=1e-4)
    assert not weights[~visual].any()
