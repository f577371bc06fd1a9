"""Tokens as ids, words and functions; what cannot be one is refused with what to do about it."""

import json

import numpy as np
import pytest
import torch

from helpers.tiny import VOCAB, tiny_image
from helpers.wrapped import fresh, model_inputs, wrapped
from hooked_mllm import HookedMLLM, SampleBatch
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.objectives import (
    AnswerLogProb,
    BoundObjective,
    FunctionObjective,
    GreedyAccuracy,
    KLDivergence,
    LogitDifference,
    Objective,
    as_objective,
    objective_values,
)
from hooked_mllm.objectives.tokens import check_tokens
from hooked_mllm.toys import VisualRetrieval

TASK = VisualRetrieval(seed=5, pages=1, filler=2)


@pytest.fixture(scope="module")
def toy():
    return HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", check=False)


@pytest.fixture(scope="module")
def samples(toy):
    return SampleBatch.collate(TASK.samples(toy, 4, answer=True), "left")


@torch.no_grad()
def test_ids_words_and_functions_name_the_same_tokens(toy, samples):
    vocabulary = toy.processor.tokenizer.get_vocab()
    ids = [vocabulary[a] for a in TASK.answers]
    want = toy(samples).float()
    at = samples.mask("last")
    own = [vocabulary[s.answer] for s in samples]
    others = [[i for i in ids if i != o] for o in own]
    due = torch.stack([row[o] - row[w].mean() for row, o, w in zip(want[at], own, others, strict=True)])
    for objective in (
        LogitDifference(wrong=TASK.answers),
        LogitDifference(wrong=ids),
        LogitDifference(wrong=torch.tensor(ids)),
        LogitDifference(wrong=np.array(ids)),
        LogitDifference(lambda s: s.answer, lambda s: [w for w in TASK.answers if w != s.answer]),
        LogitDifference(lambda s: np.int64(vocabulary[s.answer]), lambda s: ids),
    ):
        torch.testing.assert_close(objective_values(toy, samples, objective), due, rtol=1e-5, atol=1e-5)
    one = objective_values(toy, samples, AnswerLogProb(lambda s: s.answer))
    torch.testing.assert_close(one, objective_values(toy, samples, AnswerLogProb()), rtol=1e-5, atol=1e-6)
    said = (one.exp() > 0.5).tolist()
    assert objective_values(toy, samples, GreedyAccuracy()).tolist() == [float(x) for x in said]


@pytest.mark.parametrize(
    "make", [lambda t: LogitDifference(t, "red"), lambda t: LogitDifference("red", [t, "blue"]), AnswerLogProb]
)
def test_what_is_not_one_token_of_the_vocabulary_is_refused(toy, samples, make):
    inputs = toy.resolve(samples)
    for token, why in (
        ("zebra", r"'zebra' is not in the vocabulary: the tokenizer reads it as unknown.*Give a token"),
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


def test_what_names_no_token_is_refused_before_there_is_a_model():
    for given, why in (
        (5.0, "tokens is a token id, a text of one token, .*; got float"),
        (True, "got bool"),
        ([], "empty list: give one token at least"),
        (["red", None], "NoneType in it"),
        (torch.tensor([1.5]), "Tensor in it"),
    ):
        with pytest.raises(InputError, match=why):
            check_tokens("tokens", given)
    once = check_tokens("tokens", iter(["red", 5]))
    assert list(once) == list(once) == ["red", 5]
    for make in (AnswerLogProb, LogitDifference, lambda t: LogitDifference("red", t)):
        with pytest.raises(InputError, match="is an empty list"):
            make([])


def test_a_wrong_token_must_be_another_one(toy, samples):
    inputs = toy.resolve(samples)
    with pytest.raises(InputError, match=r"No wrong token is left for sample 0.*Name another token"):
        LogitDifference("red", ["red"]).bind(toy, inputs)
    with pytest.raises(InputError, match=r"corrupted sample has the same answer: name `wrong=`"):
        LogitDifference().bind(toy, inputs, inputs)
    with pytest.raises(InputError, match=r"has no wrong token: give `wrong=`.*corrupted sample"):
        LogitDifference().bind(toy, inputs)
    with pytest.raises(InputError, match=r"Expected 4 corrupted samples, one for each; got 1"):
        LogitDifference().bind(toy, inputs, toy.resolve(samples[0]))


def test_objectives_of_the_answer_need_one(toy, samples):
    prompt = TASK.samples(toy, 1)[0]
    for objective in (AnswerLogProb(), GreedyAccuracy(), LogitDifference(wrong="red")):
        with pytest.raises(InputError, match=r"sample 'visual-retrieval/.*' has none: give `answer=` to prepare"):
            objective.bind(toy, toy.resolve(prompt))
        with pytest.raises(InputError, match="plain mapping.*make samples with"):
            objective.bind(toy, toy.resolve(samples.inputs))
    with pytest.raises(InputError, match=r"of the corrupted sample, reads the answer's tokens, and sample"):
        LogitDifference("red").bind(toy, toy.resolve(samples[0]), toy.resolve(prompt))
    unknown = toy.prepare("what color is the star ?", images=tiny_image(96, 96), answer="red zebra")
    for objective in (AnswerLogProb(), GreedyAccuracy(), LogitDifference(wrong="red")):
        with pytest.raises(InputError, match="'red zebra' is not in the vocabulary: the tokenizer reads token 1"):
            objective.bind(toy, toy.resolve(unknown))


@torch.no_grad()
def test_without_a_processor_tokens_are_ids():
    model = HookedMLLM.from_model(fresh("qwen3_vl"), check=False)
    inputs = model_inputs("qwen3_vl")
    assert objective_values(model, inputs, LogitDifference(5, 6)).shape == (1,)
    with pytest.raises(InputError, match="needs a processor.*give its id"):
        objective_values(model, inputs, LogitDifference("red", 6))
    with pytest.raises(InputError, match=f"0 to {VOCAB - 1}"):
        objective_values(model, inputs, LogitDifference(VOCAB, 6))


def test_a_plain_function_is_an_objective_and_other_things_are_not(toy, samples):
    def mean_logit(logits):
        return logits[:, 0].mean(-1)

    made = as_objective(mean_logit)
    assert isinstance(made, FunctionObjective) and as_objective(made) is made and made.larger_is_better
    assert made.describe() == {"objective": "FunctionObjective", "function": "mean_logit", "positions": "last"}
    with pytest.raises(InputError, match=r"got the class LogitDifference. Make one: LogitDifference\(\)"):
        as_objective(LogitDifference)
    bound = made.bind(toy, toy.resolve(samples))
    assert isinstance(bound, BoundObjective) and "mean_logit" in repr(bound)
    for wrong in ("red", None, 5, int, bound):
        with pytest.raises(InputError, match=r"such as LogitDifference\(\)"):
            as_objective(wrong)
    for fn, got in ((lambda x: x, r"\(4, 1, \d+\)"), (lambda x: 1.0, "float"), (lambda x: x.mean(), r"\(\)")):
        with pytest.raises(InputError, match=rf"one number a sample, a tensor \(4,\); got {got}"):
            objective_values(toy, samples, fn)
    with pytest.raises(InputError, match=r"Expected a function of logits \[batch n d_vocab\]; got int"):
        FunctionObjective(int)


def test_a_function_is_given_as_many_rows_of_every_sample():
    model = wrapped("qwen3_vl")
    batch = model.prepare(["What is red?"] * 2, [tiny_image(), tiny_image()], answer=["red", "the answer is blue"])
    with pytest.raises(LayoutError, match=r"'generating' are \[\d, \d\] of these samples. Run them one by one"):
        objective_values(model, batch, FunctionObjective(lambda x: x[:, 0, 0], "generating"))


def test_descriptions_are_json_and_say_everything():
    told = [
        objective.describe()
        for objective in (
            LogitDifference(),
            LogitDifference(5, ["red", np.int64(7)]),
            LogitDifference(torch.tensor(5), len),
            AnswerLogProb(),
            AnswerLogProb("red"),
            GreedyAccuracy(),
            KLDivergence("generating"),
            KLDivergence(slice(0, 4)),
            FunctionObjective(len, torch.tensor([1, 2])),
        )
    ]
    assert json.loads(json.dumps(told)) == told and len({json.dumps(t) for t in told}) == len(told)
    assert told[1] == {"objective": "LogitDifference", "correct": 5, "wrong": ["red", 7]}
    assert told[2]["wrong"] == "function len"
    assert repr(AnswerLogProb("red")) == "AnswerLogProb(answer='red')"
    flags = {type(o): (o.larger_is_better, o.needs_clean, o.differentiable) for o in (GreedyAccuracy(), KLDivergence())}
    assert flags == {GreedyAccuracy: (True, False, False), KLDivergence: (False, True, True)}
    with pytest.raises(TypeError, match="abstract"):
        Objective()
