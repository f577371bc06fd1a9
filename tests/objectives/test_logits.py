"""Which positions are unembedded, in what precision objectives add, and how gradients reach the activations."""

import numpy as np
import pytest
import torch

from helpers.objective_witness import answer_ids, log_softmax
from helpers.tiny import VOCAB, tiny_image, tiny_processor
from helpers.wrapped import fresh, model_inputs, noise, wrapped
from hooked_mllm import HookedMLLM, SampleBatch
from hooked_mllm.errors import InputError, LayoutError, NumericsError
from hooked_mllm.objectives import (
    AnswerLogProb,
    FunctionObjective,
    GreedyAccuracy,
    KLDivergence,
    LogitDifference,
    gather_logits,
    logits_at,
    objective_values,
)


def batch(family, side="left"):
    questions = ["What colour is the mug?", "Where is the dog in the picture of the star?"]
    pictures = [tiny_image(32, 24, 0), tiny_image(24, 24, 1)]
    made = wrapped(family).prepare(questions, pictures, answer=["red", "the answer is blue"])
    return SampleBatch.collate(made.samples, side)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_at_positions_are_those_of_the_whole_run(family, side):
    model, inputs = wrapped(family), batch(family, side)
    n = len(inputs.layouts[0])
    positions = torch.tensor([[n - 1, 3, -1], [0, 5, n - 2]])
    whole = model(inputs)
    got, gathered = logits_at(model, inputs, positions), gather_logits(whole, positions)
    torch.testing.assert_close(got, gathered, rtol=0, atol=1e-4)
    assert torch.equal(gathered[1, 2], whole[1, n - 2])
    assert not got[0, 2].any() and not gathered[0, 2].any()


@torch.no_grad()
def test_only_positions_that_are_read_are_unembedded(family):
    model, inputs, lengths = wrapped(family), batch(family), []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    try:
        objective_values(model, inputs, LogitDifference(5, 6))
        objective_values(model, inputs, AnswerLogProb())
    finally:
        handle.remove()
    answers = [len(answer_ids(s)) for s in inputs]
    assert lengths == [len({len(inputs.layouts[0]) - 1 - n for n in answers}), max(answers)]


@torch.no_grad()
def test_the_last_position_of_a_plain_mapping(family):
    inputs = model_inputs(family, batch=2)
    whole = wrapped(family)(inputs)[:, -1]  # padded on the left
    got = objective_values(wrapped(family), {**inputs, "labels": inputs["input_ids"]}, LogitDifference(5, [6, 8]))
    torch.testing.assert_close(got, whole[:, 5] - whole[:, [6, 8]].mean(1), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_added_in_float32(dtype):
    model, inputs = wrapped("qwen3_vl"), batch("qwen3_vl")
    resolved = model.resolve(inputs)
    for objective in (
        AnswerLogProb(),
        AnswerLogProb([5, 6]),
        LogitDifference(5, [6, 7, 9]),
        KLDivergence("generating"),
    ):
        bound = objective.bind(model, resolved)
        logits = (30 * noise(torch.zeros(*bound.positions.shape, VOCAB))).to(dtype)
        if bound.objective.needs_clean:
            bound = bound.with_clean(logits.flip(0))
        got = bound(logits)
        double = bound.with_clean(bound.clean.double()) if bound.clean is not None else bound
        assert got.dtype == torch.float32 and double(logits.double()).dtype == torch.float64
        # the error of bfloat16 would be a tenth
        np.testing.assert_allclose(got.numpy(), double(logits.double()).numpy(), rtol=2e-6)


def test_gradients_of_the_logits_are_those_of_the_formulas(family):
    model, inputs = wrapped(family), batch(family, "right")
    resolved = model.resolve(inputs)
    bound = AnswerLogProb().bind(model, resolved)
    logits = noise(torch.zeros(*bound.positions.shape, VOCAB)).double().requires_grad_()
    bound(logits).sum().backward()
    expected = -np.exp(log_softmax(logits.detach().numpy()))
    for i, sample in enumerate(inputs):
        ids = answer_ids(sample)
        expected[i, np.arange(len(ids)), ids] += 1
        expected[i, len(ids) :] = 0  # positions after the end of this answer
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-12)

    logits.grad = None
    last = logits[:, :1]
    LogitDifference(5, [6, 8]).bind(model, resolved)(last).sum().backward()
    expected = np.zeros((2, VOCAB))
    expected[:, 5], expected[:, [6, 8]] = 1, -0.5
    np.testing.assert_allclose(logits.grad.numpy()[:, 0], expected, atol=1e-12)

    clean = noise(torch.zeros(2, 1, VOCAB), 7).double().requires_grad_()
    logits.grad = None
    KLDivergence().bind(model, resolved).with_clean(clean)(logits[:, :1]).sum().backward()
    p, q = (np.exp(log_softmax(x.detach().numpy()))[:, 0] for x in (clean, logits[:, :1]))
    np.testing.assert_allclose(logits.grad.numpy()[:, 0], q - p, atol=1e-12)
    assert clean.grad is None  # the clean run is a constant

    assert not GreedyAccuracy().bind(model, resolved)(logits).requires_grad and not GreedyAccuracy.differentiable


def test_the_graph_reaches_the_activations(family):
    model, inputs = wrapped(family), batch(family)
    direction = noise(torch.zeros(2, len(inputs.layouts[0]), model.cfg.d_model))
    unwrapped, last = fresh(family), inputs.mask("last")

    def slope(value):
        step = torch.zeros((), requires_grad=True)
        value(step).sum().backward()
        return step.grad

    def with_hook(step, objective):
        with model.hooks([("blocks.1.hook_resid_pre", lambda x, hook: x + step * direction)]):
            return objective_values(model, inputs, objective)

    def with_torch_hook(step):
        def add(module, args, kwargs):
            return (args[0] + step * direction, *args[1:]), kwargs

        handle = unwrapped.model.language_model.layers[1].register_forward_pre_hook(add, with_kwargs=True)
        logits = unwrapped(**inputs.inputs, use_cache=False).logits
        handle.remove()
        return logits

    def answers(logits):
        log_p = logits.log_softmax(-1)
        return sum(
            log_p[i, -n - 1 : -1].gather(1, inputs.inputs["input_ids"][i, -n:, None]).sum()
            for i, n in enumerate(len(answer_ids(s)) for s in inputs)
        )

    formulas = {
        AnswerLogProb(): answers,
        LogitDifference(5, 6): lambda logits: logits[last][:, 5] - logits[last][:, 6],
        FunctionObjective(lambda x: x[:, 0].logsumexp(-1)): lambda logits: logits[last].logsumexp(-1),
    }
    for objective, formula in formulas.items():
        expected = slope(lambda step, formula=formula: formula(with_torch_hook(step)))
        assert expected.abs() > 1e-3
        got = slope(lambda step, objective=objective: with_hook(step, objective))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_inputs_that_do_not_fit_raise(family):
    model, inputs = wrapped(family), batch(family)
    resolved = model.resolve(inputs)
    logits = model(inputs)
    with pytest.raises(InputError, match=r"Expected positions \[2 n\] from 0 to.*; got \[1, 1\] from 0 to 0"):
        gather_logits(logits, torch.tensor([[0]]))
    for outside in (logits.shape[1], -2):
        with pytest.raises(InputError, match=rf"Expected positions \[2 n\] from 0 to {logits.shape[1] - 1}, or -1"):
            gather_logits(logits, torch.tensor([[0], [outside]]))
        with pytest.raises(InputError, match=r"Expected positions \[2 n\] from 0 to"):
            logits_at(model, inputs, torch.tensor([[0], [outside]]))
    with pytest.raises(InputError, match=r"Expected positions \[2 n\]"):
        logits_at(model, inputs, torch.tensor([[0]]))
    bound = LogitDifference(5, 6).bind(model, resolved)
    with pytest.raises(InputError, match=r"positions \(2, 1\); got \(2, \d+, 448\).*gather_logits"):
        bound(logits)
    with pytest.raises(InputError, match=r"positions \(2, 1\); got"):
        bound.with_clean(logits)
    with pytest.raises(InputError, match=r"with_clean\(logits_at"):
        KLDivergence().bind(model, resolved)(logits[:, -1:])
    with pytest.raises(InputError, match="compares with a clean run"):
        objective_values(model, inputs, KLDivergence())
    with model.hooks([("ln_final.hook_normalized", lambda x, hook: x * float("nan"))]):
        for objective in (AnswerLogProb(), GreedyAccuracy(), LogitDifference(5, 6)):
            with pytest.raises(NumericsError, match="not a number"):
                objective_values(model, inputs, objective)
    mask = torch.zeros(2, logits.shape[1], dtype=torch.bool)
    mask[1, 4] = True
    for objective in (KLDivergence(mask), FunctionObjective(lambda x: x[:, 0, 0], mask)):
        with pytest.raises(LayoutError, match="given mask is empty for sample 0 of the batch"):
            objective.bind(model, resolved)
    with pytest.raises(InputError, match="past_key_values"):
        objective_values(model, {"input_ids": torch.tensor([[5]]), "past_key_values": object()}, LogitDifference(5, 6))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@torch.no_grad()
def test_on_a_gpu_objectives_are_those_of_the_cpu(family, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # patches are embedded by a convolution
    inputs, model = batch(family), HookedMLLM.from_model(fresh(family).to("cuda"), tiny_processor(family), check=False)
    for objective in (AnswerLogProb(), AnswerLogProb([5, 6]), GreedyAccuracy(), LogitDifference(5, [6, 7])):
        expected = objective_values(wrapped(family), inputs, objective)
        got = objective_values(model, inputs, objective)
        assert got.device.type == "cuda"
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)
    bound = KLDivergence("generating").bind(model, model.resolve(inputs))
    bound = bound.with_clean(logits_at(model, inputs, bound.positions))
    assert objective_values(model, inputs, bound).abs().max() < 1e-4
