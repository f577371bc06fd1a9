"""The divergence from a clean run against NumPy in float64."""

import numpy as np
import pytest
import torch

from helpers.objective_witness import close, log_softmax
from helpers.wrapped import wrapped
from hooked_mllm import SampleBatch, objectives
from hooked_mllm.objectives import KLDivergence, objective_values


@torch.no_grad()
@pytest.mark.parametrize("where", ["last", "generating", "question"])
def test_kl_is_that_of_the_clean_run_against_this_one(family, samples_of, where):
    model, (clean, other, _) = wrapped(family), samples_of(family)
    batch = SampleBatch.collate([clean, other], "left")
    bound = KLDivergence(where).bind(model, model.resolve(batch))
    bound = bound.with_clean(objectives.logits_at(model, batch, bound.positions))
    close(objective_values(model, batch, bound), [0, 0], 1e-6)
    edit = ("blocks.1.hook_resid_post", lambda x, hook: 0.5 * x)
    with model.hooks([edit]):
        got = objective_values(model, batch, bound)
        edited = model(batch).double().numpy()
    clean_logits = model(batch).double().numpy()
    mask = batch.mask(where).numpy()
    expected = []
    for i in range(2):
        p, q = log_softmax(clean_logits[i][mask[i]]), log_softmax(edited[i][mask[i]])
        expected.append((np.exp(p) * (p - q)).sum(-1).mean())
    assert min(expected) > 0.01
    close(got, expected)
