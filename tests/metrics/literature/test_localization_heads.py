"""Localization heads: components by flood fill, the elbow by distances, the vote by sorting."""

import math

import numpy as np
import pytest

from helpers.cache_witness import hooked
from helpers.tiny import tiny_image
from hooked_mllm import HookedMLLM, SampleBatch, toys
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.measuring.measure import measure
from hooked_mllm.metrics import (
    AttentionScore,
    KeyTokenRatio,
    LocalizationHeads,
    OCRHeads,
    RetrievalHeads,
    SparseMMHeads,
)
from hooked_mllm.metrics.literature import spatial_entropy, token_grid
from hooked_mllm.metrics.literature.localization_heads import elbow


def flood_entropy(a: np.ndarray) -> float:
    """Spatial entropy by flood fill over the eight neighbours."""
    lit = {(int(y), int(x)) for y, x in np.argwhere(a > a.mean())}
    masses = []
    while lit:
        todo, mass = [lit.pop()], 0.0
        while todo:
            y, x = todo.pop()
            mass += a[y, x] - a.mean()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & lit
            lit -= near
            todo += near
        masses.append(mass)
    return -sum(m / sum(masses) * math.log(m / sum(masses)) for m in masses) if masses else math.inf


@pytest.mark.parametrize("seed", range(6))
def test_spatial_entropy(seed):
    a = np.random.default_rng(seed).dirichlet(np.full(63, 0.2)).reshape(7, 9)
    assert spatial_entropy(a) == pytest.approx(flood_entropy(a), abs=1e-12)


def test_spatial_entropy_of_plain_maps():
    spots = np.zeros((7, 7))
    spots[[0, 0, 6, 6], [0, 6, 0, 6]] = 0.25
    assert spatial_entropy(spots) == pytest.approx(math.log(4))
    diagonal = np.eye(5)
    assert spatial_entropy(diagonal) == 0.0  # corners touch
    assert spatial_entropy(np.full((3, 3), 1 / 9.0)) == math.inf
    assert spatial_entropy(spots * 7) == pytest.approx(spatial_entropy(spots))  # not of the scale


@pytest.mark.parametrize("seed", range(40))
def test_one_spot_has_no_entropy_whatever_its_numbers(seed):
    rng = np.random.default_rng(seed)
    spot = np.zeros((8, 9), dtype=np.float32 if seed % 2 else np.float64)
    y, x = rng.integers(0, 5, 2)
    spot[y : y + 3, x : x + 3] = 0.2 + rng.random((3, 3))
    assert spatial_entropy(spot.astype(np.float64)) == 0.0
    even = 1 / 72 * (1 + 1e-7 * rng.uniform(-1, 1, (8, 9)))  # even up to the rounding of float32
    assert spatial_entropy(even) == math.inf


@pytest.mark.parametrize("name", ["toy-qwen3-vl", "toy-internvl", "toy-llava-onevision"])
def test_votes_are_those_of_any_batching(name):
    model = HookedMLLM.from_pretrained(name, dtype="float32")
    samples = [s for pages in (1, 2) for s in toys.VisualRetrieval(pages=pages).samples(model, 3, answer=True)]

    def votes(*groups):
        metrics = [
            LocalizationHeads(),
            AttentionScore(over_samples="frequency", select=4),
            AttentionScore(over_samples="frequency", select=4, reduce="topk"),
            AttentionScore(over_samples="frequency", select=4, reduce="argmax"),
            OCRHeads(),
            SparseMMHeads(),
            RetrievalHeads(),
            KeyTokenRatio(),
        ]
        batches = [SampleBatch.collate(group) if len(group) > 1 else group[0] for group in groups]
        return [scores.values for scores in model.measure(batches, metrics, progress=False)]

    alone = votes(*([sample] for sample in samples))
    for groups in ([samples], [samples[:2], samples[2:5], samples[5:]]):
        for expected, together in zip(alone, votes(*groups), strict=True):
            np.testing.assert_allclose(together, expected, atol=1e-12, rtol=0)


def test_elbow_is_farthest_from_the_chord():
    rng = np.random.default_rng(2)
    values = rng.exponential(size=200) ** 2
    ordered = np.sort(values)
    first, last = np.array([0.0, 0.0]), np.array([1.0, 1.0])
    points = np.stack([np.arange(200) / 199, (ordered - ordered[0]) / (ordered[-1] - ordered[0])], 1)
    along = (last - first) / np.linalg.norm(last - first)
    distances = [np.linalg.norm(p - first - ((p - first) @ along) * along) for p in points]
    assert elbow(values) == ordered[int(np.argmax(distances))]
    assert elbow(np.array([2.0, 2.0, 2.0])) == 2.0


@pytest.mark.parametrize("together", [False, True])
def test_formula(family, together):
    model = hooked(family)
    questions = ["What colour is the mug?", "Where is the dog?", "Where is the dog in the picture of the star?"]
    pictures = [tiny_image(96, 64, seed=1), tiny_image(64, 96, seed=2), tiny_image(80, 80, seed=3)]
    samples = [model.prepare(q, images=p) for q, p in zip(questions, pictures, strict=True)]
    mass, entropy = np.zeros((3, 3, 4)), np.zeros((3, 3, 4))
    for s, inputs in enumerate(samples):
        _, cache = model.run_with_cache(inputs, "blocks.*hook_pattern")
        grid = token_grid(inputs.layout)
        assert grid.size >= 4 and (grid >= 0).all()
        for l, h in np.ndindex(3, 4):
            row = cache["pattern", l][0, h, inputs.layout.last_index].double().numpy()
            mass[s, l, h] = row[inputs.layout.visual.numpy()].sum()
            entropy[s, l, h] = flood_entropy(row[grid])
    mean = mass.mean(0)
    kept = np.zeros((3, 4), dtype=bool)
    kept[1:] = mean[1:] > elbow(mean[1:].ravel())
    assert 0 < kept.sum() < 8
    votes = np.zeros((3, 12))
    for s in range(3):
        order = [i for i in np.argsort(entropy[s].ravel(), kind="stable") if kept.ravel()[i]]
        votes[s, order[:2]] = np.isfinite(entropy[s].ravel()[order[:2]])
    metric = LocalizationHeads(lowest=2, skip_layers=1)
    if together:
        batch = model.prepare(questions[:2], images=[[p] for p in pictures[:2]])
        found = model.measure([batch, samples[2]], metric, progress=False)
    else:
        found = measure(model, samples, metric, progress=False, group_bytes=1)
    np.testing.assert_allclose(found.values, votes.mean(0).reshape(3, 4), atol=1e-12)
    np.testing.assert_allclose(metric.image_mass().values, mean, atol=1e-5)
    assert np.array_equal(metric.kept().numpy(), kept)
    assert found.provenance["n_kept"] == kept.sum() and found.provenance["n_samples"] == 3


def test_bad_input_is_rejected(family):
    with pytest.raises(InputError, match="lowest >= 1"):
        LocalizationHeads(lowest=0)
    model = hooked(family)
    inputs = model.prepare("Where is the dog?", images=tiny_image(32, 24))
    with pytest.raises(InputError, match="the first 3 layers; the model has 3"):
        model.measure(inputs, LocalizationHeads(skip_layers=3), progress=False)
    with pytest.raises(InputError, match="needs token layouts"):
        model.measure(inputs.inputs, LocalizationHeads(), progress=False)
    with pytest.raises(LayoutError):
        model.measure(inputs, LocalizationHeads(image=1), progress=False)
    assert not any(site.taps for site in model.wiring.text)
