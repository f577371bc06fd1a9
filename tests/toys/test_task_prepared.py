"""The toy through the library: the same prompts, the same RAM map, the same collapse as under plain transformers."""

import pytest
import torch

from helpers import toy_witness as witness
from hooked_mllm import HookedMLLM, metrics
from hooked_mllm.toys import VisualRetrieval
from hooked_mllm.toys.build import PLANTED

TASK = VisualRetrieval(seed=77, pages=4)


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")


@pytest.fixture(scope="module")
def examples():
    return list(TASK.examples(24))


@pytest.fixture(scope="module")
def samples(model):
    return TASK.samples(model, 24)


def answered(model, samples, hooks=()):
    """Share of samples whose next token is the right colour."""
    vocabulary, right = model.processor.tokenizer.get_vocab(), 0
    for sample, example in zip(samples, TASK.examples(len(samples)), strict=True):
        logits = model.run_with_hooks(sample, fwd_hooks=list(hooks))
        right += int(logits[0, -1].argmax()) == vocabulary[example.answer]
    return right / len(samples)


def test_prepare_gives_the_training_format(samples, examples):
    for sample, example in zip(samples[:4], examples[:4], strict=True):
        expected = witness.inputs([example])
        assert torch.equal(sample.inputs["input_ids"], expected["input_ids"])
        assert torch.equal(sample.inputs["pixel_values"], expected["pixel_values"])


def test_one_cell_is_one_token(samples, examples):
    for sample, example in zip(samples, examples, strict=True):
        target, visual = sample.mask("target")[0], sample.mask("visual")[0]
        assert target.sum() == 1
        row, col = int(example.target.y0) // 16, int(example.target.x0) // 16
        assert visual[: int(target.nonzero())].sum() == example.target.image * 36 + row * 6 + col


def test_the_ram_map_is_that_of_plain_eager_transformers(model, samples, examples):
    scores = model.measure(samples, metrics.RetrievalAttentionMass(), progress=False)
    expected = witness.retrieval_attention_mass(examples)
    torch.testing.assert_close(torch.as_tensor(scores.values).double(), expected, atol=1e-5, rtol=0)
    assert set(scores.top(4)) == set(PLANTED)


def test_it_answers_until_the_planted_heads_are_zeroed_by_a_hook(model, samples):
    def zero(z, hook):
        z = z.clone()
        for layer, head in PLANTED:
            if hook.layer() == layer:
                z[:, :, head] = 0
        return z

    names = [f"blocks.{layer}.attn.hook_z" for layer in sorted({layer for layer, _ in PLANTED})]
    assert answered(model, samples) >= 0.95
    assert answered(model, samples, [(name, zero) for name in names]) < 0.45


def test_generate_returns_the_color_and_stops(model, examples):
    for example in examples[:3]:
        sample = model.prepare(example.question, images=example.images, system=example.system)
        out = model.generate(sample, max_new_tokens=4)
        ids = (out if isinstance(out, torch.Tensor) else out.sequences)[0]
        assert model.processor.tokenizer.decode(ids[-2:]) == f"{example.answer} <|im_end|>"
