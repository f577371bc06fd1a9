"""Tokens as ids, words and functions; errors for anything else."""

import numpy as np
import pytest
import torch

from helpers.objective_witness import TASK
from helpers.tiny import VOCAB
from helpers.wrapped import fresh, model_inputs
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import InputError
from hooked_mllm.objectives import (
    AnswerLogProb,
    GreedyAccuracy,
    LogitDifference,
    objective_values,
)
from hooked_mllm.objectives.tokens import check_tokens


@torch.no_grad()
def test_ids_words_and_functions_name_the_same_tokens(toy, samples):
    vocabulary = toy.processor.tokenizer.get_vocab()
    ids = [vocabulary[a] for a in TASK.answers]
    logits = toy(samples).float()
    last = samples.mask("last")
    own = [vocabulary[s.answer] for s in samples]
    others = [[i for i in ids if i != o] for o in own]
    reference = torch.stack([row[o] - row[w].mean() for row, o, w in zip(logits[last], own, others, strict=True)])
    for objective in (
        LogitDifference(wrong=TASK.answers),
        LogitDifference(wrong=ids),
        LogitDifference(wrong=torch.tensor(ids)),
        LogitDifference(wrong=np.array(ids)),
        LogitDifference(lambda s: s.answer, lambda s: [w for w in TASK.answers if w != s.answer]),
        LogitDifference(lambda s: np.int64(vocabulary[s.answer]), lambda s: ids),
    ):
        torch.testing.assert_close(objective_values(toy, samples, objective), reference, rtol=1e-5, atol=1e-5)
    log_p = objective_values(toy, samples, AnswerLogProb(lambda s: s.answer))
    torch.testing.assert_close(log_p, objective_values(toy, samples, AnswerLogProb()), rtol=1e-5, atol=1e-6)
    likely = (log_p.exp() > 0.5).tolist()
    assert objective_values(toy, samples, GreedyAccuracy()).tolist() == [float(x) for x in likely]


@pytest.mark.parametrize(
    "make", [lambda t: LogitDifference(t, "red"), lambda t: LogitDifference("red", [t, "blue"]), AnswerLogProb]
)
def test_values_that_are_not_one_token_of_the_vocabulary_raise(toy, samples, make):
    inputs = toy.resolve(samples)
    for token, why in (
        ("zebra", r"'zebra' is not in the vocabulary: the tokenizer reads it as unknown.*Use a token"),
        ("dark red star", r"is 3 tokens \(.*'red', 'star'\), expected one.*AnswerLogProb\(\) on samples"),
        ("", "is 0 tokens, expected one"),
        (toy.cfg.d_vocab, f"id {toy.cfg.d_vocab} is outside the vocabulary, 0 to {toy.cfg.d_vocab - 1}"),
        (-1, "id -1 is outside"),
        (lambda s: "zebra", r"\(sample\): 'zebra' is not in the vocabulary"),
        (lambda s: lambda s: 5, "another function"),
        (lambda s: 5.0, "got float"),
    ):
        if callable(token) and make("red").describe().get("wrong", "red") != "red":
            continue  # a list holds no functions
        with pytest.raises(InputError, match=why):
            make(token).bind(toy, inputs)


def test_values_that_are_no_token_raise_without_a_model():
    for tokens, why in (
        (5.0, "tokens is a token id, a text of one token, .*; got float"),
        (True, "got bool"),
        ([], "empty list: specify at least one token"),
        (["red", None], "NoneType in it"),
        (torch.tensor([1.5]), "Tensor in it"),
        (torch.tensor(1.5), "tokens is a token id.*got Tensor"),
    ):
        with pytest.raises(InputError, match=why):
            check_tokens("tokens", tokens)
    checked = check_tokens("tokens", iter(["red", 5]))
    assert list(checked) == list(checked) == ["red", 5]
    for make in (AnswerLogProb, LogitDifference, lambda t: LogitDifference("red", t)):
        with pytest.raises(InputError, match="is an empty list"):
            make([])


@torch.no_grad()
def test_without_a_processor_tokens_are_ids():
    model = HookedMLLM.from_model(fresh("qwen3_vl"), check=False)
    inputs = model_inputs("qwen3_vl")
    assert objective_values(model, inputs, LogitDifference(5, 6)).shape == (1,)
    with pytest.raises(InputError, match="needs a processor.*use the token's id"):
        objective_values(model, inputs, LogitDifference("red", 6))
    with pytest.raises(InputError, match=f"0 to {VOCAB - 1}"):
        objective_values(model, inputs, LogitDifference(VOCAB, 6))
