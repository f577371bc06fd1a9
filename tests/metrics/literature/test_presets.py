"""The attention and argmax scores of the literature against loops over the rows, as their papers write them."""

import numpy as np
import pytest

from helpers.attention_reference import random_layers
from helpers.talking import LENGTHS, measured, per_sample, positions, talking
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.metrics import GazeHeads, OCRHeads, RetrievalHeads, SparseMMHeads, VisualRetrievalHeads


@pytest.mark.parametrize(("metric", "queries"), [(VisualRetrievalHeads, "answer"), (GazeHeads, "last")])
def test_mass(metric, queries):
    layers, tokens = talking()

    def formula(attention, b):
        rows, keys = positions(layers, queries, b), positions(layers, "target", b)
        return sum(attention[i, j] for i in rows for j in keys) / len(rows)

    np.testing.assert_allclose(measured(metric(), layers, tokens), per_sample(layers, formula), atol=3e-6)
    scores = metric()
    scores.update(view=layers.view())
    even = random_layers(lengths=LENGTHS, heads=6, kv_heads=2, sharpness=0.0)
    even.masks = layers.masks
    chance = np.array(scores.compute().provenance["chance"])
    np.testing.assert_allclose(measured(metric(), even, tokens), np.repeat(chance[:, None], 6, 1), atol=1e-6)


def test_ocr_heads():
    layers, tokens = talking()

    def formula(attention, b):
        rows, keys = positions(layers, "generating", b), positions(layers, "target", b)
        return np.mean([int(attention[i].argmax()) in keys for i in rows])

    expected = per_sample(layers, formula)
    assert (expected > 0).sum() > 5  # hits happen
    np.testing.assert_allclose(measured(OCRHeads(), layers, tokens), expected, atol=1e-7)


@pytest.mark.parametrize("group", [1, 3])
def test_sparse_mm_heads(group):
    layers, tokens = talking()

    def formula(attention, b):
        keys, score = positions(layers, "target", b), 0.0
        for answer_token in positions(layers, "answer", b):  # the row that generates a token is the one before it
            score += (int(attention[answer_token - 1].argmax()) in keys) / len(keys)
        return score

    expected = per_sample(layers, formula)
    np.testing.assert_allclose(measured(SparseMMHeads(), layers, tokens, group), expected, atol=1e-7)


def test_bad_input_is_rejected():
    layers, _ = talking()
    for keys in ("target", "visual"):
        with pytest.raises(InputError, match="Use OCRHeads"):
            RetrievalHeads(keys=keys)
    with pytest.raises(InputError, match="compares tokens"):
        RetrievalHeads().update(view=layers.view())
    layers.masks["generating"][1] = False
    with pytest.raises(LayoutError, match="'generating' mask is empty for sample 1"):
        OCRHeads().update(view=layers.view())
