"""The bundled toys on short videos: they answer, by the planted heads where there are any, and their cards are true."""

import json

import numpy as np
import pytest
import torch

from helpers import toy_witness as witness
from hooked_mllm import HookedMLLM, metrics
from hooked_mllm.toys import VideoRetrieval, path
from hooked_mllm.toys.build import PLANTED

PLANTED_TOYS = ["toy-qwen3-vl", "toy-llava-onevision", "toy-internvl"]
TOYS = [*PLANTED_TOYS, "toy-qwen3-vl-free"]
TASK = VideoRetrieval(seed=77)


@pytest.fixture(scope="module")
def held_out():
    """24 questions about videos of four moments."""
    return list(TASK.examples(24))


def by_score(scores):
    return [divmod(int(i), scores.shape[1]) for i in scores.flatten().argsort(descending=True, stable=True)]


@pytest.mark.parametrize("name", TOYS)
def test_it_answers(name, held_out):
    assert witness.accuracy(held_out, name=name) >= 0.97
    assert witness.accuracy(list(VideoRetrieval(seed=78, moments=2).examples(16)), name=name) >= 0.97


@pytest.mark.parametrize("name", PLANTED_TOYS)
def test_the_planted_heads_retrieve_from_videos_too(name, held_out):
    order = by_score(witness.retrieval_attention_mass(held_out[:8], name))
    assert set(order[:4]) == set(PLANTED)
    assert witness.accuracy(held_out, order[:4], name=name) < 0.4
    others = order[4:]
    drawn = np.random.default_rng(0).permutation(len(others))[:8]
    assert witness.accuracy(held_out, [others[i] for i in drawn], name=name) >= 0.9


@pytest.mark.parametrize("name", TOYS)
def test_it_watches_the_video(name, held_out):
    """The same questions about other videos: the old answers come out no more often than by chance (1/8)."""
    swapped = [type(e)(o.video, e.question, e.system, e.answer, e.target, e.shape, e.id)
               for e, o in zip(held_out, held_out[1:] + held_out[:1], strict=True)]  # fmt: skip
    assert witness.accuracy(swapped, name=name) < 0.4


@pytest.mark.parametrize("name", TOYS)
def test_the_library_sees_the_same_prompt_and_the_same_ram(name):
    model, examples = HookedMLLM.from_pretrained(name, dtype="float32"), list(TASK.examples(3))
    samples = TASK.samples(model, 3)
    for sample, example in zip(samples, examples, strict=True):
        expected = witness.inputs([example], name)
        assert torch.equal(sample.inputs["input_ids"], expected["input_ids"])
        pixels = next(key for key in expected if key.startswith("pixel_values"))
        torch.testing.assert_close(sample.inputs[pixels], expected[pixels])
    scores = model.measure(samples, metrics.RetrievalAttentionMass(), progress=False)
    expected = witness.retrieval_attention_mass(examples, name)
    torch.testing.assert_close(torch.as_tensor(scores.values).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TOYS)
def test_the_card_agrees_with_the_report_on_videos(name, held_out):
    report = json.loads((path(name) / "training.json").read_text())["video"]
    card = (path(name) / "README.md").read_text()
    for value in [*report["accuracy_float32"].values(), *report["accuracy_bfloat16"].values()]:
        assert value >= 0.97
        assert f"{value:.3f}" in card
    for value in [*report["ram_top"].values(), *report["zeroed"].values()]:
        assert f"{value:.3f}" in card
    ram = witness.retrieval_attention_mass(held_out[:8], name)
    assert np.abs(np.array(report["ram"]) - ram.numpy()).max() < 0.15  # a mean over 8 other examples
