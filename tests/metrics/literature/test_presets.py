"""The attention and argmax scores of the literature against loops over the rows, as their papers write them."""

import numpy as np
import pytest
import torch

from helpers.attention_reference import Layers, random_layers
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.measuring.view_context import ViewContext
from hooked_mllm.metrics import GazeHeads, OCRHeads, RetrievalHeads, SparseMMHeads, VisualRetrievalHeads

LENGTHS = (23, 20, 17)


def talking() -> tuple[Layers, torch.Tensor]:
    """Layers whose samples end in an answer of 5 to 7 tokens, and token ids from a vocabulary of three."""
    layers = random_layers(lengths=LENGTHS, heads=6, kv_heads=2, sharpness=1.0)
    generator = torch.Generator().manual_seed(1)
    for b in range(len(LENGTHS)):
        answer = torch.zeros(23, dtype=torch.bool)
        answer[-5 - b :] = True
        layers.masks["answer"][b] = answer
        layers.masks["question"][b] = False
        layers.masks["question"][b, 9 + 2 * b : 16 - b] = True
    layers.masks["generating"] = layers.masks["answer"].roll(-1, 1) & ~layers.masks["padding"]
    layers.masks["generating"][:, -1] = False
    return layers, torch.randint(0, 3, (3, 23), generator=generator)


def measured(metric, layers: Layers, tokens: torch.Tensor, group: int = 3) -> np.ndarray:
    for start in range(0, layers.n_layers, group):
        metric.update(view=layers.view(range(start, start + group), context=ViewContext(tokens)))
    return metric.compute().values.numpy()


def per_sample(layers: Layers, formula) -> np.ndarray:
    """The mean over samples of formula(attention [query key], sample) for every head."""
    out = np.zeros(layers.attention.shape[:3])
    for l, b, h in np.ndindex(*out.shape):
        out[l, b, h] = formula(layers.attention[l, b, h], b)
    return out.mean(1)


def positions(layers: Layers, name: str, b: int) -> list[int]:
    return np.flatnonzero(layers.masks[name][b]).tolist()


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

    want = per_sample(layers, formula)
    assert (want > 0).sum() > 5  # hits happen
    np.testing.assert_allclose(measured(OCRHeads(), layers, tokens), want, atol=1e-7)


@pytest.mark.parametrize("group", [1, 3])
def test_sparse_mm_heads(group):
    layers, tokens = talking()

    def formula(attention, b):
        keys, score = positions(layers, "target", b), 0.0
        for said in positions(layers, "answer", b):  # the row that generates a token is the one before it
            score += (int(attention[said - 1].argmax()) in keys) / len(keys)
        return score

    want = per_sample(layers, formula)
    np.testing.assert_allclose(measured(SparseMMHeads(), layers, tokens, group), want, atol=1e-7)


@pytest.mark.parametrize("released_code", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_retrieval_heads(released_code, group):
    layers, tokens = talking()

    def formula(attention, b):
        needle, copied = positions(layers, "question", b), []
        for said in positions(layers, "answer", b):
            place = int(attention[said - 1].argmax())
            if place in needle and tokens[b, place] == tokens[b, said]:
                copied.append(place)
        return len(copied if released_code else set(copied)) / len(needle)

    want = per_sample(layers, formula)
    assert (want > 0).sum() > 5
    metric = RetrievalHeads(released_code=released_code)
    np.testing.assert_allclose(measured(metric, layers, tokens, group), want, atol=1e-7)


def test_repeats_count_in_the_released_code_alone():
    layers, tokens = talking()
    paper, code = (measured(RetrievalHeads(released_code=r), layers, tokens) for r in (False, True))
    assert (code >= paper - 1e-12).all() and (code > paper + 1e-9).any()


def test_refusals():
    layers, _ = talking()
    for keys in ("target", "visual"):
        with pytest.raises(InputError, match="Use OCRHeads"):
            RetrievalHeads(keys=keys)
    with pytest.raises(InputError, match="compares tokens"):
        RetrievalHeads().update(view=layers.view())
    layers.masks["generating"][1] = False
    with pytest.raises(LayoutError, match="'generating' mask is empty for sample 1"):
        OCRHeads().update(view=layers.view())
