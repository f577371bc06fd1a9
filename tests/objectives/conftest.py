"""Samples with answers, of tiny models and of a toy."""

import pytest

from helpers.objective_witness import TASK
from helpers.tiny import tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import HookedMLLM, SampleBatch

QUESTIONS = ("What colour is the mug?", "Where is the dog in the picture of the star?", "What is red?")
ANSWERS = ("red", "the answer is blue", "yellow star")


@pytest.fixture(scope="module")
def samples_of():
    made = {}

    def make(family):
        if family not in made:
            made[family] = [
                wrapped(family).prepare(q, images=tiny_image(32, 24, seed), answer=a, id=f"s{seed}")
                for seed, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
            ]
        return made[family]

    return make


@pytest.fixture(scope="module")
def toy():
    return HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", check=False)


@pytest.fixture(scope="module")
def samples(toy):
    return SampleBatch.collate(TASK.samples(toy, 4, answer=True), "left")
