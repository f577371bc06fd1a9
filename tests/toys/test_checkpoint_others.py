"""The toys other than `toy-qwen3-vl`: their answers, the layouts of their classes, and their cards."""

import itertools
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from helpers import toy_witness as witness
from hooked_mllm import HookedMLLM, metrics
from hooked_mllm.toys import VisualRetrieval, bundled, path
from hooked_mllm.toys.build import PLANTED, build_config, build_tokenizer, chat_template

PLANTED_TOYS = ["toy-llava-onevision", "toy-internvl"]
TOYS = [*PLANTED_TOYS, "toy-qwen3-vl-free"]
FAMILY = {
    "toy-llava-onevision": "llava_onevision",
    "toy-internvl": "internvl",
    "toy-qwen3-vl-free": "qwen3_vl",
}
TASK = VisualRetrieval(seed=77, pages=4)


@pytest.fixture(scope="module")
def held_out():
    """32 questions over four pages."""
    return list(TASK.examples(32))


def by_score(scores):
    return [divmod(int(i), scores.shape[1]) for i in scores.flatten().argsort(descending=True, stable=True)]


@pytest.mark.parametrize("name", TOYS)
def test_it_is_bundled_small_and_built_by_the_code(name):
    family = FAMILY[name]
    assert name in bundled()
    assert sum(f.stat().st_size for f in path(name).iterdir()) < 4 * 2**20
    with safe_open(path(name) / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}
    assert (path(name) / "chat_template.jinja").read_text() == chat_template(family)
    assert witness.processor(name).tokenizer.get_vocab() == build_tokenizer(family).get_vocab()
    config, built = witness.model(name=name).config, build_config(build_tokenizer(family), family)
    for part in ("text_config", "vision_config"):
        expected, actual = getattr(built, part).to_dict(), getattr(config, part).to_dict()
        for volatile in ("dtype", "transformers_version", "_attn_implementation"):
            expected.pop(volatile, None), actual.pop(volatile, None)
        assert actual == expected


@pytest.mark.parametrize(
    ("name", "pages", "runs"),
    [
        ("toy-llava-onevision", 1, [("<image>", 36 + 6 * 7)]),
        ("toy-llava-onevision", 2, [("<image>", 2 * 37)]),
        ("toy-internvl", 2, [("<img>", 1), ("<IMG_CONTEXT>", 45), ("</img>", 1)] * 2),
    ],
)
def test_the_prompt_has_the_visual_layout_of_the_class(name, pages, runs):
    example = VisualRetrieval(pages=pages, filler=3).example(0)
    tokenizer = witness.processor(name).tokenizer
    tokens = tokenizer.convert_ids_to_tokens(witness.inputs([example], name)["input_ids"][0])
    found = [(token, len(list(group))) for token, group in itertools.groupby(tokens)]
    text = [*example.system.split(), *tokenizer.tokenize(example.question), "<|im_end|>", "<|im_start|>", "assistant"]
    assert found[:2] == [("<|im_start|>", 1), ("user", 1)]
    assert found[2 : 2 + len(runs)] == runs
    assert [token for token, n in found[2 + len(runs) :] for _ in range(n)] == text


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("pages", [1, 2, 4])
def test_it_answers(name, pages):
    assert witness.accuracy(list(VisualRetrieval(seed=78, pages=pages).examples(36)), name=name) >= 0.97


@pytest.mark.parametrize("name", PLANTED_TOYS)
def test_the_heads_of_highest_ram_are_the_planted_ones_and_carry_the_answer(name, held_out):
    ram = witness.retrieval_attention_mass(held_out[:16], name)
    order = by_score(ram)
    assert set(order[:4]) == set(PLANTED)
    assert witness.accuracy(held_out, order[:4], name=name) < 0.4
    assert witness.accuracy(held_out, order[-8:], name=name) >= 0.97
    others = order[4:]
    drawn = np.random.default_rng(0).permutation(len(others))[:8]
    assert witness.accuracy(held_out, [others[i] for i in drawn], name=name) >= 0.9


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("pages", [1, 4])
def test_the_library_finds_the_same_target_tokens_and_the_same_ram(name, pages):
    task = VisualRetrieval(seed=77, pages=pages)
    model, examples = HookedMLLM.from_pretrained(name, dtype="float32"), list(task.examples(6))
    samples = task.samples(model, 6)
    for sample, example in zip(samples, examples, strict=True):
        expected = witness.inputs([example], name)
        assert torch.equal(sample.inputs["input_ids"], expected["input_ids"])
        torch.testing.assert_close(sample.inputs["pixel_values"], expected["pixel_values"])
        assert sample.mask("target").sum() == len(witness.within_page(example, name))
    scores = model.measure(samples, metrics.RetrievalAttentionMass(), progress=False)
    expected = witness.retrieval_attention_mass(examples, name)
    torch.testing.assert_close(torch.as_tensor(scores.values).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TOYS)
def test_the_card_agrees_with_the_report_and_states_the_kind_of_the_model(name):
    report = json.loads((path(name) / "training.json").read_text())
    card = (path(name) / "README.md").read_text()
    planted = name in PLANTED_TOYS
    assert ("Its retrieval heads were planted" in card) == planted
    assert ("No constraint was put on its heads" in card) != planted
    assert report["planted"] == ([f"L{layer}H{head}" for layer, head in PLANTED] if planted else [])
    assert (report["recipe"]["window"] is not None) == planted
    assert report["parameters"] == sum(p.numel() for p in witness.model(name=name).parameters())
    assert all(value >= 0.97 for value in report["accuracy_float32"].values())
    for value in [*report["accuracy_float32"].values(), *report["zeroed"].values(), *report["hybrid"].values()]:
        assert f"{value:.3f}" in card
    ram = witness.retrieval_attention_mass(list(TASK.examples(16)), name)
    assert np.abs(np.array(report["ram"]) - ram.numpy()).max() < 0.15  # a mean over 16 other examples
