"""Dense heads selected by prompt against a static ranking, at equal budget: tables over the bundled toys.

    python examples/adaptive_routing.py [FOLDER] [PROMPTS]

Some heads are dense; the others see the first 4 tokens and a window. Rankings, layer quotas and thresholds come from
other samples than the prompts that they are evaluated on. Prompts of four tasks alternate. In the first table the
window is so short that every target lies outside it; in the second, it contains the target of some prompts. Writes
`adaptive_routing.json`, `adaptive_routing_findings.md` and `adaptive_routing.png` into FOLDER (default: the working
directory).
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from hooked_mllm import HeadScores, HeadSet, HookedMLLM, HybridAttention, metrics
from hooked_mllm.attention.routing import QueryAwareHeads, StaticHeads, Total
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.storage import ready_folder, write_figure, write_text
from hooked_mllm.toys import VideoRetrieval, VisualRetrieval

TOYS = ("toy-qwen3-vl", "toy-llava-onevision", "toy-internvl", "toy-qwen3-vl-free")
TASKS: dict[str, Callable[[int], Any]] = {
    "1 page": lambda seed: VisualRetrieval(seed=seed, pages=1),
    "2 pages": lambda seed: VisualRetrieval(seed=seed, pages=2),
    "4 pages": lambda seed: VisualRetrieval(seed=seed, pages=4),
    "video": lambda seed: VideoRetrieval(seed=seed),
}
DETECTION, EVALUATION = 3001, 3004  # seeds of the tasks: no sample is in both
SINK, SHORT, LONG = 4, 16, 96  # tokens of the sink and of the two windows
QUERIES, BLOCK = 12, 8  # about the question, of 5 to 8 tokens, and the end of the template
KS = (1, 2, 4, 8)
RANDOM_SEEDS = 3
BASE = "static: RAM of all tasks"
MEANS = (1, 2)  # in the second table: mean heads per prompt; at most twice that number in one prompt


class Prompt(NamedTuple):
    """A sample, its task, and the id of its answer, which is one word."""

    task: str
    sample: Sample
    answer: int


class Outcome(NamedTuple):
    """For each prompt: log-probability of the answer, whether it is the most likely token, number of dense heads."""

    log_prob: list[float]
    right: list[bool]
    heads: list[int]


#: outcomes by policy and number of heads
Table = dict[str, dict[int, Outcome]]


def prompts(model: HookedMLLM, seed: int, n: int) -> list[Prompt]:
    """`n` prompts of every task, alternating."""
    ids = model.processor.tokenizer.convert_tokens_to_ids
    by_task = []
    for name, make in TASKS.items():
        task = make(seed)
        by_task.append([Prompt(name, task.prepared(model, e), ids(e.answer)) for e in task.examples(n)])
    return [prompt for group in zip(*by_task, strict=True) for prompt in group]


def hybrid(policy: QueryAwareHeads | StaticHeads, window: int) -> HybridAttention:
    return HybridAttention(policy, sink=SINK, window=window, implementation="naive")


@torch.no_grad()
def evaluate(model: HookedMLLM, evaluated: Sequence[Prompt], policy: QueryAwareHeads, window: int) -> Outcome:
    """Evaluate every prompt separately under a policy."""
    outcome = Outcome([], [], [])
    with model.attention(hybrid(policy, window)):
        for prompt in evaluated:
            log_probs = model(prompt.sample, logits_to_keep=1)[0, -1].log_softmax(-1)  # [vocabulary]
            outcome.log_prob.append(float(log_probs[prompt.answer]))
            outcome.right.append(int(log_probs.argmax()) == prompt.answer)
            outcome.heads.append(sum(map(len, policy.chosen.values())))
    return outcome


@torch.no_grad()
def evaluate_static(model: HookedMLLM, evaluated: Sequence[Prompt], heads: HeadSet, window: int) -> Outcome:
    """Evaluate prompts with fixed dense heads, in batches of one task."""
    order, log_prob, right = [], [], []
    with model.attention(hybrid(StaticHeads(heads), window)):
        for task in TASKS:
            indices = [i for i, prompt in enumerate(evaluated) if prompt.task == task]
            if not indices:
                continue
            batch = SampleBatch.collate([evaluated[i].sample for i in indices])
            log_probs = model(batch, logits_to_keep=1)[:, -1].log_softmax(-1)  # [sample vocabulary]
            answers = torch.tensor([evaluated[i].answer for i in indices])
            order += indices
            log_prob += log_probs.gather(1, answers[:, None])[:, 0].tolist()
            right += (log_probs.argmax(1) == answers).tolist()
    inverse = np.argsort(order)
    return Outcome([log_prob[i] for i in inverse], [right[i] for i in inverse], [len(heads)] * len(evaluated))


@torch.no_grad()
def lost(model: HookedMLLM, samples: Sequence[Sample], window: int, **settings: Any) -> list[HeadScores]:
    """The attention that every head would lose on every sample, measured with all heads dense."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    policy = QueryAwareHeads(Total(n_layers * n_heads, like="first"), queries=QUERIES, block=BLOCK, **settings)
    scores = []
    with model.attention(hybrid(policy, window)):
        for sample in samples:
            model(sample, logits_to_keep=1)
            scores.append(HeadScores([policy.record[layer].scores for layer in range(n_layers)], name="lost attention"))
    return scores


def ram_of(model: HookedMLLM, measured: Sequence[Prompt]) -> HeadScores:
    """RAM over these prompts; a new metric for each call, because a metric accumulates samples."""
    return model.measure([prompt.sample for prompt in measured], metrics.RetrievalAttentionMass(), progress=False)


def mean(scores: Sequence[HeadScores]) -> HeadScores:
    """The mean over samples."""
    return HeadScores(torch.stack([item.values for item in scores]).mean(0), name="lost attention")


def equal_heads(model: HookedMLLM, known: Sequence[Prompt], evaluated: Sequence[Prompt]) -> Table:
    """Every policy at every number of heads; targets are outside the window."""
    of = {task: ram_of(model, [p for p in known if p.task == task]) for task in TASKS}
    ram = HeadScores(torch.stack([scores.values for scores in of.values()]).mean(0), name="RAM")
    length = mean(lost(model, [p.sample for p in known], SHORT, order=2))
    fixed = {
        BASE: ram,
        "static: RAM of 4 pages": of["4 pages"],
        "static: RAM of videos": of["video"],
        "static: lost length": length,
    }
    cache: dict[HeadSet, Outcome] = {}  # rankings often agree

    def static(heads: HeadSet) -> Outcome:
        if heads not in cache:
            cache[heads] = evaluate_static(model, evaluated, heads, SHORT)
        return cache[heads]

    rows: Table = {name: {k: static(scores.top(k)) for k in KS} for name, scores in fixed.items()}
    draws = {k: [static(ram.random(k, seed)) for seed in range(RANDOM_SEEDS)] for k in KS}
    rows[f"static: random ({RANDOM_SEEDS} draws)"] = {
        k: Outcome(*(np.mean([draw[i] for draw in outcomes], 0).tolist() for i in range(3)))
        for k, outcomes in draws.items()
    }
    rows |= adaptive_rows(model, evaluated, ram, length)
    rows["each prompt's own RAM (uses the target)"] = own = {k: Outcome([], [], []) for k in KS}
    for prompt in evaluated:
        scores = ram_of(model, [prompt])
        for k in KS:
            outcome = evaluate_static(model, [prompt], scores.top(k), SHORT)
            for values, prompt_values in zip(own[k], outcome, strict=True):
                values += prompt_values
    return rows


def adaptive_rows(model: HookedMLLM, evaluated: Sequence[Prompt], ram: HeadScores, length: HeadScores) -> Table:
    """Policies that select heads by prompt, at every number of heads."""
    adaptive: dict[str, tuple[HeadScores, dict[str, Any]]] = {
        "adaptive: lost mass": (length, {"order": 1}),
        "adaptive: lost length": (length, {"order": 2}),
        "adaptive: RAM x lost mass": (ram, {"order": 1, "prior": ram}),
        "adaptive: RAM x lost length": (ram, {"order": 2, "prior": ram}),
        f"adaptive: RAM x lost length, mean of {BLOCK} keys": (ram, {"order": 2, "prior": ram, "keys": "mean"}),
    }
    rows: Table = {}
    for name, (quotas, settings) in adaptive.items():
        rows[name] = {}
        for k in KS:
            policy = QueryAwareHeads(Total(k, like=quotas.top(k)), queries=QUERIES, block=BLOCK, **settings)
            rows[name][k] = evaluate(model, evaluated, policy, SHORT)
    return rows


def some_need_none(model: HookedMLLM, known: Sequence[Prompt], evaluated: Sequence[Prompt]) -> Table:
    """Policies at equal mean numbers of heads; the window contains the target of some prompts."""
    ram = ram_of(model, known)
    rows = {BASE: {k: evaluate_static(model, evaluated, ram.top(k), LONG) for k in range(2 * max(MEANS) + 1)}}
    for keys in ("exact", "mean"):
        name = "adaptive: RAM x lost length" + ("" if keys == "exact" else f", mean of {BLOCK} keys")
        rows[name] = {}
        for k in MEANS:
            budget = Total(2 * k, like=ram.top(2 * k))
            policy = partial(QueryAwareHeads, budget, queries=QUERIES, block=BLOCK, order=2, prior=ram, keys=keys)
            scores = sorted(selected_scores(model, known, policy()), reverse=True)
            # k heads per known prompt: half-way between the last selected score and the next one
            threshold = sum(scores[k * len(known) - 1 : k * len(known) + 1]) / 2
            rows[name][k] = evaluate(model, evaluated, policy(threshold=threshold), LONG)
    return rows


def selected_scores(model: HookedMLLM, known: Sequence[Prompt], policy: QueryAwareHeads) -> list[float]:
    """The scores of the heads that a policy without a threshold selects, and 0 for every unused place in its budget."""
    scores = []
    for prompt in known:
        evaluate(model, [prompt], policy, LONG)
        scores += [choice.scores[head] for choice in policy.record.values() for head in choice.heads]
    return scores + [0.0] * (policy.budget.heads * len(known) - len(scores))


def estimates(model: HookedMLLM, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Mean error of the lost mass estimated from blocks, and the shared fraction of a layer's top two heads."""
    exact = lost(model, samples, SHORT)
    results = {}
    for keys in ("mean", "bound", "sample"):
        errors, shared = [], []
        for estimate, true in zip(lost(model, samples, SHORT, keys=keys), exact, strict=True):
            errors.append(float((estimate.values - true.values).mean()))
            layers = zip(estimate.values, true.values, strict=True)
            shared += [len({*_top_two(a)} & {*_top_two(b)}) / 2 for a, b in layers]
        results[keys] = {"error": float(np.mean(errors)), "shared": float(np.mean(shared))}
    return results


def _top_two(values: torch.Tensor) -> list[int]:
    return values.sort(descending=True, stable=True).indices[:2].tolist()


def difference(outcome: Outcome, base: Outcome) -> tuple[float, float]:
    """The mean difference in log-probability over the prompts, and half its 95 % interval (normal)."""
    gap = np.subtract(outcome.log_prob, base.log_prob)
    return float(gap.mean()), float(1.96 * gap.std(ddof=1) / len(gap) ** 0.5)


def at_heads(rows: dict[int, Outcome], heads: float) -> Outcome:
    """Log-probabilities of static heads at a fractional number of heads, interpolated between whole numbers."""
    low = min(int(heads), max(rows) - 1)
    log_prob = (1 - heads + low) * np.array(rows[low].log_prob) + (heads - low) * np.array(rows[low + 1].log_prob)
    return Outcome(log_prob.tolist(), [], [])


def cell(outcome: Outcome, base: Outcome | None = None) -> str:
    """Log-probability / accuracy, with the sign of a difference from the base above its interval and 0.01."""
    sign = ""
    if base is not None:
        gap, half = difference(outcome, base)
        sign = "" if abs(gap) < max(half, 0.01) else " +" if gap > 0 else " -"
    return f"{np.mean(outcome.log_prob):.2f} / {np.mean(outcome.right):.2f}{sign}"


def report(results: dict[str, Any]) -> str:
    """The findings as Markdown tables."""
    heads = [f"{k} dense" for k in KS]
    lines = [f"| toy | policy | {' | '.join(heads)} |", "| --- " * (2 + len(KS)) + "|"]
    for toy, result in results.items():
        rows = result["equal"]
        for name, by_k in rows.items():
            cells = [cell(by_k[k], None if name == BASE else rows[BASE][k]) for k in KS]
            lines.append(f"| {toy} | {name} | {' | '.join(cells)} |")
    header = (
        "| toy | target outside | policy | heads used | log-probability / accuracy | gain over equally many static |"
    )
    lines += ["", header, "| --- " * 6 + "|"]
    for toy, result in results.items():
        rows = result["some"]
        for name, by_k in rows.items():
            for outcome in by_k.values():
                used = float(np.mean(outcome.heads))
                gap, half = difference(outcome, at_heads(rows[BASE], used))
                gain = "" if name == BASE else f"{gap:+.2f} ± {half:.2f}"
                lines.append(f"| {toy} | {result['outside']:.0%} | {name} | {used:.2f} | {cell(outcome)} | {gain} |")
    lines += ["", "| toy | blocks of | mean error of the lost mass | top two heads of a layer |", "| --- " * 4 + "|"]
    for toy, result in results.items():
        for keys, estimate in result["estimates"].items():
            lines.append(f"| {toy} | {BLOCK}, {keys} | {estimate['error']:+.3f} | {estimate['shared']:.2f} |")
    return "\n".join(lines) + "\n"


def figure(results: dict[str, Any]) -> Figure:
    """The second table: log-probability of the answer against dense heads used, one panel per toy."""
    drawing = Figure(figsize=(3.2 * len(results), 3.2), layout="constrained")
    for axes, (toy, result) in zip(np.atleast_1d(drawing.subplots(1, len(results))), results.items(), strict=True):
        for name, by_k in result["some"].items():
            points = sorted((np.mean(outcome.heads), np.mean(outcome.log_prob)) for outcome in by_k.values())
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_title(toy, fontsize="medium")
        axes.set_xlabel("dense heads per prompt (mean)")
    drawing.axes[0].set_ylabel("log-probability of the answer")
    drawing.axes[-1].legend(fontsize="x-small", loc="lower right")
    return drawing


def outside(prompt: Prompt) -> bool:
    """Whether a part of the target is outside the long window of the prompt's last token."""
    target = prompt.sample.mask("target").flatten()
    return int(target.int().argmax()) <= len(target) - 1 - LONG


def main(folder: Path, n: int) -> dict[str, Any]:
    """Measure every toy, print and write the tables."""
    ready_folder(folder)
    results: dict[str, Any] = {}
    for toy in TOYS:
        model = HookedMLLM.from_pretrained(toy, dtype="float32", check=False)
        known, evaluated = prompts(model, DETECTION, n), prompts(model, EVALUATION, n)
        results[toy] = {
            "equal": equal_heads(model, known, evaluated),
            "some": some_need_none(model, known, evaluated),
            "outside": float(np.mean([outside(prompt) for prompt in evaluated])),
            "estimates": estimates(model, [prompt.sample for prompt in evaluated[: 2 * len(TASKS)]]),
        }
    text = report(results)
    write_text(folder / "adaptive_routing_findings.md", text)
    plain = {
        toy: {
            **result,
            **{
                table: {name: {k: o._asdict() for k, o in by_k.items()} for name, by_k in result[table].items()}
                for table in ("equal", "some")
            },
        }
        for toy, result in results.items()
    }
    write_text(folder / "adaptive_routing.json", json.dumps({"prompts_a_task": n, "toys": plain}, indent=1) + "\n")
    write_figure(folder / "adaptive_routing.png", figure(results))
    print(text)
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(), int(sys.argv[2]) if len(sys.argv) > 2 else 12)
