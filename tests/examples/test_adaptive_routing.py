"""The tables of adaptive routing on few prompts: equal budgets, disjoint samples, numbers recomputed from parts."""

import json

import numpy as np
import pytest

from helpers.example_script import import_example
from hooked_mllm import HeadSet, HookedMLLM, HybridAttention
from hooked_mllm.attention.routing import QueryAwareHeads, Total
from hooked_mllm.metrics import RetrievalAttentionMass

TOY = "toy-internvl"
N = 1


@pytest.fixture(scope="module")
def example():
    return import_example("adaptive_routing")


@pytest.fixture(scope="module")
def made(example, tmp_path_factory):
    folder, patch = tmp_path_factory.mktemp("routing"), pytest.MonkeyPatch()
    tasks = {name: example.TASKS[name] for name in ("4 pages", "video")}
    with patch.context() as patched:
        for name, value in {"TOYS": (TOY,), "KS": (1, 4), "RANDOM_SEEDS": 1, "TASKS": tasks}.items():
            patched.setattr(example, name, value)
        found = example.main(folder, N)[TOY]
        model = HookedMLLM.from_pretrained(TOY, dtype="float32", check=False)
        yield folder, found, model, example.prompts(model, example.EVALUATION, N)


def test_it_writes_what_it_returns(example, made):
    folder, found, _, _ = made
    toy = json.loads((folder / "adaptive_routing.json").read_text())["toys"][TOY]
    for table in ("equal", "some"):
        rows = {name: {str(k): outcome._asdict() for k, outcome in by_k.items()} for name, by_k in found[table].items()}
        assert toy[table] == rows
    lines = (folder / "adaptive_routing_findings.md").read_text().splitlines()
    assert sum(line.startswith(f"| {TOY} |") for line in lines) == len(found["equal"]) + 5 + 2 * 2 + 3
    assert (folder / "adaptive_routing.png").read_bytes()[:4] == b"\x89PNG"


def test_budgets_are_equal_and_kept(example, made):
    _, found, _, _ = made
    for name, by_k in found["equal"].items():
        for k, outcome in by_k.items():
            assert len(outcome.log_prob) == len(outcome.right) == 2 * N
            assert outcome.heads == [k] * (2 * N), name
    for name, by_k in found["some"].items():
        for k, outcome in by_k.items():
            assert outcome.heads == [k] * (2 * N) if name == example.BASE else max(outcome.heads) <= 2 * k


def test_samples_to_rank_by_and_to_try_on_are_disjoint(example, made):
    _, _, model, evaluated = made
    known = {p.sample.id for p in example.prompts(model, example.DETECTION, N)}
    assert len(known) == 2 * N and not known & {p.sample.id for p in evaluated}


def test_an_adaptive_row_is_what_its_heads_give(example, made):
    _, found, model, evaluated = made
    known = example.prompts(model, example.DETECTION, N)
    pages, videos = (
        model.measure([p.sample for p in known if p.task == task], RetrievalAttentionMass(), progress=False)
        for task in ("4 pages", "video")
    )
    scores = (pages + videos) / 2
    policy = QueryAwareHeads(Total(4, like=scores.top(4)), queries=example.QUERIES, order=2, prior=scores)
    row = found["equal"]["adaptive: RAM x lost length"][4]
    for i, prompt in enumerate(evaluated):
        with model.attention(HybridAttention(policy, sink=4, window=16, implementation="naive")):
            model(prompt.sample)
        heads = [(layer, head) for layer, some in policy.chosen.items() for head in some]
        chosen = HeadSet(heads, n_layers=model.cfg.n_layers, n_heads=model.cfg.n_heads)
        with model.attention(HybridAttention(chosen, sink=4, window=16, implementation="naive")):
            last = model(prompt.sample)[0, -1].log_softmax(-1)
        np.testing.assert_allclose(row.log_prob[i], float(last[prompt.answer]), atol=1e-4)
        assert row.right[i] == (int(last.argmax()) == prompt.answer)


def test_a_difference_has_the_interval_of_its_mean(example):
    outcome, base = (example.Outcome(list(map(float, values)), [], []) for values in ([1, 2, 3, 6], [1, 1, 1, 1]))
    gap, half = example.difference(outcome, base)
    assert gap == 2.0 and half == pytest.approx(1.96 * np.sqrt(14 / 3) / 2)
    right = example.Outcome([-1.0, -3.0, -1.0], [True, False, True], [1, 1, 1])
    worse = example.Outcome([-2.0, -4.0, -2.1], [True, False, True], [1, 1, 1])
    assert example.cell(right, worse) == "-1.67 / 0.67 +" and example.cell(worse, right) == "-2.70 / 0.67 -"
    assert example.cell(right, right) == "-1.67 / 0.67"


def test_lots_between_static_numbers_of_heads(example):
    rows = {k: example.Outcome([float(k), 10.0 * k], [], []) for k in range(3)}
    for heads in (0.0, 0.25, 1.5, 2.0):
        assert example.at_heads(rows, heads).log_prob == pytest.approx([heads, 10 * heads])
