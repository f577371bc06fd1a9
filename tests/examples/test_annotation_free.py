"""The table of annotation-free scores: disjoint samples, and numbers that the parts give by themselves."""

import json

import numpy as np
import pytest

from helpers import toy_witness
from helpers.example_script import import_example
from hooked_mllm.toys import VisualRetrieval

N = 6


@pytest.fixture(scope="module")
def example():
    return import_example("annotation_free")


@pytest.fixture(scope="module")
def made(example, tmp_path_factory):
    folder, patch = tmp_path_factory.mktemp("table"), pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setattr(example, "TOYS", ("toy-qwen3-vl",))
        patched.setattr(example, "RANDOM_SEEDS", 1)
        return folder, example.main(folder, N)


def test_it_writes_what_it_returns(example, made):
    folder, report = made
    assert json.loads((folder / "annotation_free.json").read_text()) == report
    assert (folder / "annotation_free.png").read_bytes()[:4] == b"\x89PNG"
    assert sum(line.startswith("| toy-qwen3-vl |") for line in example.table(report).splitlines()) == 8 + 2


def test_samples_to_rank_by_and_to_evaluate_on_are_disjoint(made):
    scenes = [
        VisualRetrieval(seed=made[1][f"{use}_seed"]).scene(i) for use in ("detection", "evaluation") for i in range(N)
    ]
    assert len({scene.pixels.tobytes() for scene in scenes}) == 2 * N


def test_numbers_are_those_of_plain_transformers(example, made):
    found = made[1]["toys"]["toy-qwen3-vl"]
    ram = found["rows"]["RetrievalAttentionMass"]
    due = toy_witness.retrieval_attention_mass(list(VisualRetrieval(seed=example.DETECTION).examples(N)))
    np.testing.assert_allclose(ram["scores"], due, atol=1e-4)
    held_out = list(VisualRetrieval(seed=example.EVALUATION).examples(N))
    assert found["unchanged"] == toy_witness.accuracy(held_out)
    zeroed = [tuple(map(int, name[1:].split("H"))) for name in ram["top_4"]]
    assert ram["zeroed_4"] == toy_witness.accuracy(held_out, zeroed)


def test_every_wording_names_the_same_shape(example):
    wordings = {item.shape: example.wordings(item.question) for item in VisualRetrieval().examples(20)}
    for shape, texts in wordings.items():
        assert len(set(texts)) == 4 and all(shape in text for text in texts)
    for item in VisualRetrieval().examples(20):
        assert item.question in wordings[item.shape]
