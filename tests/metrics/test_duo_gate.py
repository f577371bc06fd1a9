"""DuoGate: gates against a plain implementation on unwrapped models, and on the toy whose heads are known."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, BatchFeature
from transformers.masking_utils import eager_mask

from helpers.intervention_witness import batch, sample
from helpers.wrapped import LAYERS, plain, wrapped
from hooked_mllm import HookedMLLM
from hooked_mllm.errors import CacheFileError, HookValueError, InputError, LayoutError, NumericsError
from hooked_mllm.metrics import DuoGate
from hooked_mllm.metrics.gating import MixedAttention, last_hidden
from hooked_mllm.toys import VisualRetrieval

SMALL = {"sink": 2, "recent": 3, "steps": 5, "lr": 0.1, "l1": 2.0}


# -- a plain implementation: an attention of its own in transformers' interface, Adam by its formulas -----------------


def streaming(real: Tensor, sink: int, recent: int) -> Tensor:
    """Which keys a query may see by nearness, [batch query key], one by one."""
    out = torch.zeros(*real.shape, real.shape[1], dtype=torch.bool)
    for b, row in enumerate(real):
        place = [i for i, there in enumerate(row) if there]
        for n, i in enumerate(place):
            for m, j in enumerate(place[: n + 1]):
                out[b, i, j] = m < sink or n - m < recent
    return out


class Plain:
    """Attention through scores and softmax, on the mask that transformers' eager attention gets."""

    def __init__(self) -> None:
        self.gates: Tensor | None = None
        self.near: Tensor | None = None

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = (torch.cat([x[:, h // groups, None] for h in range(query.shape[1])], 1) for x in (key, value))
        scores = query @ key.transpose(2, 3) * scaling + attention_mask[:, :, :, : key.shape[2]]
        full = scores.softmax(-1) @ value
        if self.gates is None:
            return full.transpose(1, 2), None
        hidden = torch.finfo(scores.dtype).min
        near = torch.where(self.near[:, None], scores, torch.full_like(scores, hidden)).softmax(-1) @ value
        mixed = []
        for head in range(query.shape[1]):
            gate = self.gates[module.layer_idx, head // groups]
            mixed.append(gate * full[:, head] + (1 - gate) * near[:, head])
        return torch.stack(mixed, dim=2), None


PLAIN = Plain()
AttentionInterface.register("plain_gates", PLAIN)
AttentionMaskInterface.register("plain_gates", eager_mask)


def states(model, inputs, rows):
    return model.model(**inputs.inputs, use_cache=False).last_hidden_state[rows]


def plain_gates(family, items, *, sink, recent, steps, lr, l1, seed):
    model = plain(family)
    before = model.config.text_config._attn_implementation
    model.config.text_config._attn_implementation = "plain_gates"
    gates, m, s = torch.ones(LAYERS, 2), torch.zeros(LAYERS, 2), torch.zeros(LAYERS, 2)
    try:
        for t in range(steps):
            order = np.random.default_rng([seed, t // len(items)]).permutation(len(items))
            item = items[order[t % len(items)]]
            real = item.inputs["attention_mask"].bool()
            rows = torch.zeros_like(real)
            for b, question in enumerate(item.mask("question")):
                rows[b, int(question.nonzero()[0]) :] = True
            rows &= real
            PLAIN.gates = None
            with torch.no_grad():
                due = states(model, item, rows)
            PLAIN.gates, PLAIN.near = gates.clone().requires_grad_(), streaming(real, sink, recent)
            distance = (states(model, item, rows) - due).square().sum(-1).div(due.shape[-1]).mean()
            loss = distance + l1 * PLAIN.gates.abs().sum() / gates.numel()
            (g,) = torch.autograd.grad(loss, PLAIN.gates)
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
            warmth = min(1, max((t + 1) / (steps / 5), 0.1), max((steps - t) / (steps / 5), 0.1))
            move = (m / (1 - 0.9 ** (t + 1))) / ((s / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            gates = (gates - lr * warmth * move).clamp(0, 1)
    finally:
        PLAIN.gates = PLAIN.near = None
        model.config.text_config._attn_implementation = before
    return gates, float(distance.detach())


@pytest.mark.parametrize("side", ["left", "right"])
def test_its_steps_are_those_of_a_plain_implementation(family, side):
    items = [sample(family, 0), batch(family, side)]
    settings = {**SMALL, "steps": 5, "seed": 3}
    gates, distance = plain_gates(family, items, **settings)
    found = DuoGate(**settings).run(wrapped(family), items, progress=False)
    assert gates.std() > 0.02  # not the plain decay that the l1 term alone would make
    torch.testing.assert_close(found.values.float(), gates, atol=2e-3, rtol=0)
    assert found.provenance["distance"] == pytest.approx(distance, rel=0.02)
    assert found.provenance["heads"] == "key-value" and found.provenance["n_samples"] == 2
    assert found.provenance["config"] == {**settings, "positions": "suffix"}


# -- what it leaves and what it gives ----------------------------------------------------------------------------------


def test_it_gives_the_same_again_and_leaves_the_model_alone(family):
    model, items = wrapped(family), [sample(family, 0), sample(family, 1)]
    logits = model(items[0])
    first = DuoGate(**SMALL).run(model, items, progress=False)
    assert first == DuoGate(**SMALL).run(model, items, progress=False)
    assert first != DuoGate(**SMALL, seed=4).run(model, items, progress=False)  # another order
    assert torch.equal(model(items[0]), logits)
    assert not model.list_hooks() and all(site.backend is None for site in model.wiring.text)
    assert all(p.grad is None for p in model.hf_model.parameters())


def test_parameters_that_train_get_no_gradient_and_train_on():
    model = wrapped("qwen3_vl")
    model.hf_model.requires_grad_(True)
    try:
        gate = DuoGate(**SMALL).run(model, sample("qwen3_vl", 0), progress=False)
        assert all(p.requires_grad and p.grad is None for p in model.hf_model.parameters())
    finally:
        model.hf_model.requires_grad_(False)
    assert gate == DuoGate(**SMALL).run(model, [sample("qwen3_vl", 0)], progress=False)


def test_open_gates_are_the_model_and_so_is_a_window_as_long_as_the_prompt(family):
    model, inputs = wrapped(family), wrapped(family).resolve(batch(family))
    real = ~inputs.masks("padding")
    due = last_hidden(model, inputs, real)
    shape = (model.cfg.n_layers, model.cfg.n_key_value_heads)
    for gates, recent in ((torch.ones(shape), 1), (torch.zeros(shape), inputs.length)):
        with model.attention(MixedAttention(gates, 0, recent, ~real)):
            torch.testing.assert_close(last_hidden(model, inputs, real), due, atol=1e-4, rtol=1e-4)
    with model.attention(MixedAttention(torch.zeros(shape), 0, 1, ~real)):
        assert (last_hidden(model, inputs, real) - due).abs().max() > 0.1


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path, monkeypatch):
    model, items, path = wrapped("internvl"), [sample("internvl", 0), sample("internvl", 1)], tmp_path / "gates"
    due = DuoGate(**SMALL).run(model, items, progress=False)
    calls = []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return distance(*arguments)

    distance = DuoGate._distance
    with monkeypatch.context() as patched:
        patched.setattr(DuoGate, "_distance", lambda self, *arguments: stop(self, *arguments))
        with pytest.raises(KeyboardInterrupt):
            DuoGate(**SMALL).run(model, items, checkpoint=path, progress=False)
    assert not model.list_hooks() and all(site.backend is None for site in model.wiring.text)
    with monkeypatch.context() as patched:
        patched.setattr(DuoGate, "_distance", lambda self, *arguments: (calls.append(1), distance(self, *arguments))[1])
        again = DuoGate(**SMALL).run(model, items, checkpoint=path, progress=False)
    assert len(calls) == 4 + SMALL["steps"] - 3  # three steps were kept
    assert again == due
    with pytest.raises(CacheFileError, match=r"another run: it differs in lr \(.* in the file, 0.2 now\), samples"):
        DuoGate(**{**SMALL, "lr": 0.2}).run(model, items[:1], checkpoint=path, progress=False)
    path.write_bytes(b"none of that")
    with pytest.raises(CacheFileError, match="damaged"):
        DuoGate(**SMALL).run(model, items, checkpoint=path, progress=False)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def toy(request):
    return HookedMLLM.from_pretrained("toy-qwen3-vl", dtype=request.param)


def test_the_planted_heads_keep_their_gates(toy):
    samples = VisualRetrieval(seed=5, pages=1, filler=24).samples(toy, 3)
    gate = DuoGate(sink=4, recent=16, steps=15, lr=0.12, l1=0.5, positions="last")
    found = gate.run(toy, samples, progress=False)
    assert str(found.top(2)) in ("L2H2, L2H3", "L2H3, L2H2")
    assert min(found["L2H2"], found["L2H3"]) > 0.6
    others = found.values.clone()
    others[2, 2:] = 0
    assert others.max() < 0.3
    assert {str(h) for h in str(found.to_query(8).top(4)).split(", ")} == {"L2H4", "L2H5", "L2H6", "L2H7"}


# -- what is rejected --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"sink": -1}, {"recent": 0}, {"steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"l1": -0.1}]
)
def test_settings_out_of_range(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(InputError, match=re.escape(f"{name}={value}")):
        DuoGate(**wrong)


def test_inputs_that_do_not_do():
    model, inputs = wrapped("qwen3_vl"), sample("qwen3_vl", 0).inputs
    with pytest.raises(InputError, match="is empty"):
        DuoGate(**SMALL).run(model, [])
    with pytest.raises(LayoutError, match="question"):
        DuoGate(**SMALL).run(model, inputs, progress=False)
    gates = [
        DuoGate(**SMALL, positions="last").run(model, samples, progress=False)
        for samples in (sample("qwen3_vl", 0), inputs, BatchFeature(inputs), iter([inputs]))
    ]
    assert gates[0].shape == (LAYERS, 2) and all(torch.equal(g.values, gates[0].values) for g in gates)


def test_a_hook_that_takes_the_place_of_the_gates():
    model = wrapped("qwen3_vl")
    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: x * 0.5)]),
        pytest.raises(HookValueError, match="keeps the gates from layers"),
    ):
        DuoGate(**SMALL).run(model, sample("qwen3_vl", 0), progress=False)


def test_hidden_states_that_overflow():
    model = wrapped("qwen3_vl")
    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: x * float("inf"))]),
        pytest.raises(NumericsError, match="not finite"),
    ):
        DuoGate(**SMALL).run(model, sample("qwen3_vl", 0), progress=False)
