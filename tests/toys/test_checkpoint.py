"""The bundled checkpoint, under plain transformers: it answers, and its planted heads are the ones that retrieve."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from helpers import toy_witness as witness
from hooked_mllm.errors import InputError
from hooked_mllm.toys import VisualRetrieval, bundled, path, resolve
from hooked_mllm.toys.build import PLANTED

NAME = "toy-qwen3-vl"


@pytest.fixture(scope="module")
def held_out():
    """48 questions over four pages."""
    return list(VisualRetrieval(seed=77, pages=4).examples(48))


@pytest.fixture(scope="module")
def ram(held_out):
    return witness.retrieval_attention_mass(held_out[:32])


def ranked(scores):
    return [divmod(int(i), scores.shape[1]) for i in scores.flatten().argsort(descending=True, stable=True)]


def test_names_resolve():
    assert NAME in bundled()
    assert (path(NAME) / "config.json").is_file()
    assert resolve(NAME) == str(path(NAME))
    assert resolve("Qwen/Qwen3-VL-4B-Instruct") == "Qwen/Qwen3-VL-4B-Instruct"
    with pytest.raises(InputError, match="Did you mean 'toy-qwen3-vl'"):
        path("toy-qwen-vl")


def test_it_is_small_and_in_bfloat16_safetensors():
    files = list(path(NAME).iterdir())
    assert sum(f.stat().st_size for f in files) < 2 * 2**20
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".pkl"}]
    with safe_open(path(NAME) / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}


@pytest.mark.parametrize("pages", [1, 2])
def test_it_answers(pages):
    assert witness.accuracy(list(VisualRetrieval(seed=78, pages=pages).examples(40))) >= 0.97


def test_it_answers_over_four_pages(held_out):
    assert witness.accuracy(held_out) >= 0.97


def test_it_answers_in_bfloat16(held_out):
    assert witness.accuracy(held_out[:16], dtype=torch.bfloat16) >= 0.9375  # one slip allowed


def test_it_looks_at_the_pages():
    """The same questions over other pages: the old answers come out no more often than by chance (1/8)."""
    examples = list(VisualRetrieval(seed=79, pages=1).examples(48))
    swapped = [type(e)(o.images, e.question, e.system, e.answer, e.target, e.shape, e.id)
               for e, o in zip(examples, examples[1:] + examples[:1], strict=True)]  # fmt: skip
    assert witness.accuracy(swapped) < 0.35


def test_the_planted_heads_have_the_highest_ram(ram):
    assert set(ranked(ram)[:4]) == set(PLANTED)
    fourth, fifth = ram.flatten().sort(descending=True).values[3:5]
    assert fourth > 2 * fifth


def test_zeroing_the_planted_heads_brings_it_to_chance_and_other_heads_do_nothing(held_out, ram):
    order = ranked(ram)
    assert witness.accuracy(held_out, order[:4]) < 0.35
    assert witness.accuracy(held_out, order[-8:]) >= 0.95
    others = np.random.default_rng(0).permutation(len(order) - 4)[:8] + 4
    assert witness.accuracy(held_out, [order[i] for i in others]) >= 0.95


def test_the_card_agrees_with_the_report_and_the_report_with_the_model(ram):
    report = json.loads((path(NAME) / "training.json").read_text())
    card = (path(NAME) / "README.md").read_text()
    assert "planted" in card.lower()
    assert all(f"L{layer}H{head}" in card for layer, head in PLANTED)
    assert report["planted"] == [f"L{layer}H{head}" for layer, head in PLANTED]
    assert report["parameters"] == sum(p.numel() for p in witness.model().parameters())
    # other examples than the report's: a mean over 32 of them may differ by a few hundredths
    assert np.abs(np.array(report["ram"]) - ram.numpy()).max() < 0.08
    assert all(value >= 0.97 for value in report["accuracy_float32"].values())
    for value in [*report["accuracy_float32"].values(), *report["zeroed"].values(), *report["hybrid"].values()]:
        assert f"{value:.3f}" in card
