"""GreedyAccuracy against `generate`, on the toys and on random models, with and without heads ablated."""

from dataclasses import replace

import pytest
import torch

from helpers.tiny import tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import HeadAblation, HookedMLLM, SampleBatch
from hooked_mllm.objectives import GreedyAccuracy, objective_values
from hooked_mllm.toys import VisualRetrieval

TASK = VisualRetrieval(seed=21, pages=1, filler=4)
N = 12
END = "<|im_end|>"


@torch.no_grad()
@pytest.mark.parametrize(
    ("toy", "heads"),
    [("toy-qwen3-vl", "L2H4, L2H5, L2H6, L2H7"), ("toy-llava-onevision", None), ("toy-internvl", None)],
)
def test_it_agrees_with_generate_on_the_toys(toy, heads):
    model = HookedMLLM.from_pretrained(toy, dtype="float32", check=False)
    heads = heads or [(layer, head) for layer in (1, 2) for head in range(model.cfg.n_heads)]
    examples = list(TASK.examples(N))
    # every third one with a wrong answer, every second one with the token that ends the turn
    answers = [
        (TASK.answers[i % 8] if i % 3 == 0 else e.answer) + (END if i % 2 else "") for i, e in enumerate(examples)
    ]

    def prepared(answer):
        return model.prepare(
            [e.question for e in examples], [e.images for e in examples], system=[e.system for e in examples], **answer
        )

    prompts, answered = prepared({}), prepared({"answer": answers})
    tokenizer = model.processor.tokenizer
    answer_ids = [tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
    assert {len(ids) for ids in answer_ids} == {1, 2}
    accuracies = set()
    for interventions in ([], [HeadAblation(heads, mode="zero", phase="both")]):
        with model.intervene(*interventions):
            generated = model.generate(prompts, max_new_tokens=2, do_sample=False)[:, -2:].tolist()
            got = objective_values(model, answered, GreedyAccuracy()).tolist()
        expected = [float(tokens[: len(ids)] == ids) for tokens, ids in zip(generated, answer_ids, strict=True)]
        assert got == expected
        accuracies.add(tuple(expected))
    assert len(accuracies) == 2, "the ablation changed nothing"
    assert max(map(sum, accuracies)) >= N // 2, "the toy does not answer"


@torch.no_grad()
def test_it_agrees_with_generate_on_longer_answers(family):
    model = wrapped(family)
    questions = [("What colour is the mug?", tiny_image(32, 24, 3)), ("Where is it?", tiny_image(24, 24, 4))]
    ablation = HeadAblation([(0, 1), (1, 2), (2, 0), (2, 3)], mode="zero", phase="both")
    n = len(model.processor.tokenizer("xyzw", add_special_tokens=False)["input_ids"])
    with model.intervene(ablation):
        answered = []
        for question, image in questions:
            prompt = model.prepare(question, images=image)
            generated = model.generate(prompt, max_new_tokens=n, do_sample=False, eos_token_id=None)[0, len(prompt) :]
            sample = model.prepare(question, images=image, answer="xyzw")
            ids = torch.cat([sample.inputs["input_ids"][:, :-n], generated[None]], 1)
            answered.append(replace(sample, inputs={**sample.inputs, "input_ids": ids}))
        for side in ("left", "right"):
            assert objective_values(model, SampleBatch.collate(answered, side), GreedyAccuracy()).tolist() == [1, 1]
    assert objective_values(model, answered[0], GreedyAccuracy()).tolist() == [0]
