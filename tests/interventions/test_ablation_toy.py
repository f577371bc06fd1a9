"""On the bundled toy: without its planted heads it guesses, without as many others it still answers."""

import pytest
import torch

from hooked_mllm import HeadAblation, HookedMLLM, metrics
from hooked_mllm.toys import VisualRetrieval

TASK = VisualRetrieval(seed=78, pages=1, filler=4)


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")


@torch.no_grad()
def answered(model, samples, heads=None, phase="prefill"):
    """Share of samples whose next token is the right colour."""
    vocabulary, right = model.processor.tokenizer.get_vocab(), 0
    chosen = [] if heads is None else [HeadAblation(heads, mode="zero", phase=phase)]
    for s, example in zip(samples, TASK.examples(len(samples)), strict=True):
        with model.intervene(*chosen):
            right += int(model(s)[0, -1].argmax()) == vocabulary[example.answer]
    return right / len(samples)


def test_ablating_the_top_heads_collapses_it_and_the_bottom_ones_do_not(model):
    samples = TASK.samples(model, 16)
    scores = model.measure(samples, metrics.RetrievalAttentionMass(), progress=False)
    assert {str(h) for h in str(scores.top(4)).split(", ")} == {"L2H4", "L2H5", "L2H6", "L2H7"}
    assert answered(model, samples) >= 0.9
    assert answered(model, samples, scores.bottom(4)) >= 0.9
    assert answered(model, samples, scores.top(4)) <= 0.5
    assert answered(model, samples, scores.top(4), phase="decode") >= 0.9  # the answer's first token is the prefill's
