"""QRHead and MMRetHeads against NumPy on the patterns of the two prompts, run apart."""

import numpy as np
import pytest
import torch

from helpers.cache_witness import QUESTIONS, hooked, sample
from helpers.tiny import tiny_image
from hooked_mllm import Box
from hooked_mllm.errors import InputError
from hooked_mllm.metrics import MMRetHeads, NullQuery, QRHead


@pytest.fixture
def model(family):
    return hooked(family)


def samples(model):
    boxes = (Box(0, 0, 32, 20), Box(8, 4, 24, 24), Box(25, 20, 26, 21))
    return [
        model.prepare(QUESTIONS[n % 2], images=tiny_image(32, 24, seed=n), target=box, id=f"s{n}")
        for n, box in enumerate(boxes)
    ]


def profile(model, inputs) -> np.ndarray:
    """[layer head key]: the mean row of the question's tokens."""
    _, cache = model.run_with_cache(inputs, "blocks.*hook_pattern")
    question = inputs.mask("question")[0]
    return np.stack([cache["pattern", i][0][:, question].double().mean(1).numpy() for i in range(3)])


def null_of(model, s):
    """The null prompt made by the model's own processor; only the target is carried over."""
    return model.prepare("N/A", images=s.images[0], target=s.target)


def test_the_null_sample_is_what_the_processor_would_have_made(model):
    for s in samples(model):
        got, expected = NullQuery().sample(model, s), null_of(model, s)
        assert got.inputs.keys() == expected.inputs.keys()
        for name, value in expected.inputs.items():
            assert torch.equal(got.inputs[name], value), name
        assert got.question == "N/A" and got.id is None
        assert got.layout.last_index == expected.layout.last_index
        assert torch.equal(got.target_mask, expected.target_mask)
        for name in ("question", "visual", "template", "last", "pixels"):
            assert torch.equal(got.layout.mask(name), expected.layout.mask(name)), name
        assert torch.equal(got.layout.boxes.nan_to_num(-1), expected.layout.boxes.nan_to_num(-1))
        at = s.target_mask.nonzero()
        assert torch.equal(got.target_mask.nonzero(), at)  # the evidence keeps its positions


def test_the_answer_is_dropped(model):
    with_answer = model.prepare(QUESTIONS[0], images=tiny_image(32, 24), answer="the answer is red")
    got = NullQuery("so").sample(model, with_answer)
    expected = model.prepare("so", images=tiny_image(32, 24))
    assert torch.equal(got.inputs["input_ids"], expected.inputs["input_ids"]) and got.answer is None
    with pytest.raises(InputError, match="without answer="):
        next(NullQuery().pairs(model, with_answer))


def test_mm_ret_heads(model):
    chosen = samples(model)
    reference = np.mean(
        [
            (profile(model, s) - np.pad(p := profile(model, n), ((0, 0), (0, 0), (0, len(s) - p.shape[2]))))[
                ..., s.target_mask.numpy()
            ].sum(-1)
            for s, n in ((s, null_of(model, s)) for s in chosen)
        ],
        axis=0,
    )
    found = model.measure(NullQuery().pairs(model, chosen), MMRetHeads(), progress=False)
    np.testing.assert_allclose(found.values, reference, atol=1e-5)
    assert found.provenance["sample_ids"] == ["s0", "s1", "s2"] and found.provenance["n_samples"] == 3
    levels = [
        s.layout.chance(s.target_mask) - null_of(model, s).layout.chance(null_of(model, s).target_mask) for s in chosen
    ]
    np.testing.assert_allclose(found.provenance["chance"], np.full(3, np.mean(levels)), atol=1e-6)
    assert 0 < found.rho_half() < 0.5


@pytest.mark.parametrize("outlier", [2.0, 0.5])
def test_qr_head(model, outlier):
    chosen, scores, dropped = samples(model), [], 0
    for s in chosen:
        at = s.target_mask.numpy()
        real = profile(model, s)[..., at]
        change = real - profile(model, null_of(model, s))[..., np.flatnonzero(at)]
        total = np.zeros(change.shape[:2])
        for l, h in np.ndindex(*total.shape):
            tokens = change[l, h]
            for value in tokens:
                if len(tokens) == 1 or value > tokens.mean() - outlier * tokens.std(ddof=1):
                    total[l, h] += value
                else:
                    dropped += 1
        scores.append(total)
    metric = QRHead(outlier=outlier).keep_samples()
    found = model.measure(NullQuery().pairs(model, chosen), metric, progress=False)
    np.testing.assert_allclose(found.values, np.mean(scores, axis=0), atol=1e-5)
    np.testing.assert_allclose(metric.sample_scores().values, scores, atol=1e-5)
    assert dropped or outlier == 2.0


def test_bad_input_is_rejected(family, model):
    one, two = samples(model)[:2]
    with pytest.raises(InputError, match="needs pairs"):
        model.measure(one, MMRetHeads(), progress=False)
    from hooked_mllm import SampleBatch

    with pytest.raises(InputError, match="are no pair"):
        model.measure(SampleBatch.collate([one, two]), QRHead(), progress=False)
    with pytest.raises(InputError, match="has no tokens"):
        NullQuery("").sample(model, one)
    with pytest.raises(InputError, match="outlier must be above 0"):
        QRHead(outlier=0.0)
    assert sample(family).answer  # with an answer
