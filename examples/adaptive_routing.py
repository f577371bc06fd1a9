"""Dense heads chosen from the prompt against a static ranking, at equal budget: tables over the bundled toys.

    python examples/adaptive_routing.py [FOLDER] [PROMPTS]

Some heads are dense; the others see the first 4 tokens and a window. Rankings, layer quotas and thresholds come from
other samples than the prompts they are tried on. Prompts of four tasks take turns. In the first table the window is so
short that every target lies outside it; in the second, it holds the target of some prompts and not of others.
Writes `adaptive_routing.json`, `adaptive_routing_findings.md` and `adaptive_routing.png` into FOLDER (default: the
working directory).
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
SINK, SHORT, LONG = 4, 16, 96
QUERIES, BLOCK = 12, 8  # about the question and the end of the template; a question is 5 to 8 tokens
KS = (1, 2, 4, 8)
RANDOM_SEEDS = 3
BASE = "static: RAM of all tasks"
MEANS = (1, 2)  # in the second table: heads a prompt on the mean; at most twice as many


class Prompt(NamedTuple):
    """A sample, its task, and the id of its answer, which is one word."""

    task: str
    sample: Sample
    answer: int


class Found(NamedTuple):
    """The log-probability of each prompt's answer, whether it is the most likely token, and the dense heads used."""

    log_prob: list[float]
    right: list[bool]
    heads: list[int]


def prompts(model: HookedMLLM, seed: int, n: int) -> list[Prompt]:
    """`n` prompts of every task, tasks taking turns."""
    ids = model.processor.tokenizer.convert_tokens_to_ids
    by_task = []
    for name, make in TASKS.items():
        task = make(seed)
        by_task.append([Prompt(name, task.prepared(model, e), ids(e.answer)) for e in task.examples(n)])
    return [prompt for turn in zip(*by_task, strict=True) for prompt in turn]


@torch.no_grad()
def tried(model: HookedMLLM, asked: Sequence[Prompt], policy: Any, window: int) -> Found:
    """Every prompt by itself, under a policy."""
    found = Found([], [], [])
    with model.attention(HybridAttention(policy, sink=SINK, window=window, implementation="naive")):
        for prompt in asked:
            row = model(prompt.sample, logits_to_keep=1)[0, -1].log_softmax(-1)
            found.log_prob.append(float(row[prompt.answer]))
            found.right.append(int(row.argmax()) == prompt.answer)
            found.heads.append(sum(map(len, policy.chosen.values())))
    return found


@torch.no_grad()
def tried_static(model: HookedMLLM, asked: Sequence[Prompt], heads: HeadSet, window: int) -> Found:
    """The same under fixed heads, in batches of one task."""
    order, log_prob, right = [], [], []
    with model.attention(HybridAttention(StaticHeads(heads), sink=SINK, window=window, implementation="naive")):
        for task in TASKS:
            places = [i for i, prompt in enumerate(asked) if prompt.task == task]
            if not places:
                continue
            batch = SampleBatch.collate([asked[i].sample for i in places])
            rows = model(batch, logits_to_keep=1)[:, -1].log_softmax(-1)
            answers = torch.tensor([asked[i].answer for i in places])
            order += places
            log_prob += rows.gather(1, answers[:, None])[:, 0].tolist()
            right += (rows.argmax(1) == answers).tolist()
    back = np.argsort(order)
    return Found([log_prob[i] for i in back], [right[i] for i in back], [len(heads)] * len(asked))


@torch.no_grad()
def lost(model: HookedMLLM, samples: Sequence[Sample], window: int, **settings: Any) -> list[HeadScores]:
    """What every head would lose on every sample, if all heads are dense."""
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    policy = QueryAwareHeads(Total(n_layers * n_heads, like="first"), queries=QUERIES, block=BLOCK, **settings)
    found = []
    with model.attention(HybridAttention(policy, sink=SINK, window=window, implementation="naive")):
        for sample in samples:
            model(sample, logits_to_keep=1)
            found.append(HeadScores([policy.record[layer].scores for layer in range(n_layers)], name="lost attention"))
    return found


def ram_of(model: HookedMLLM, some: Sequence[Prompt]) -> HeadScores:
    """RAM over these prompts; a new metric each time, since one goes on counting."""
    return model.measure([prompt.sample for prompt in some], metrics.RetrievalAttentionMass(), progress=False)


def mean(scores: Sequence[HeadScores]) -> HeadScores:
    """The mean over samples."""
    return HeadScores(torch.stack([one.values for one in scores]).mean(0), name="lost attention")


def equal_heads(model: HookedMLLM, known: Sequence[Prompt], asked: Sequence[Prompt]) -> dict[str, dict[int, Found]]:
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
    cache: dict[HeadSet, Found] = {}  # rankings often agree

    def static(heads: HeadSet) -> Found:
        if heads not in cache:
            cache[heads] = tried_static(model, asked, heads, SHORT)
        return cache[heads]

    rows: dict[str, dict[int, Found]] = {name: {k: static(scores.top(k)) for k in KS} for name, scores in fixed.items()}
    draws = {k: [static(ram.random(k, seed)) for seed in range(RANDOM_SEEDS)] for k in KS}
    rows[f"static: random ({RANDOM_SEEDS} draws)"] = {
        k: Found(*(np.mean([draw[i] for draw in found], 0).tolist() for i in range(3))) for k, found in draws.items()
    }
    adaptive: dict[str, tuple[HeadScores, dict[str, Any]]] = {
        "adaptive: lost mass": (length, {"order": 1}),
        "adaptive: lost length": (length, {"order": 2}),
        "adaptive: RAM x lost mass": (ram, {"order": 1, "prior": ram}),
        "adaptive: RAM x lost length": (ram, {"order": 2, "prior": ram}),
        f"adaptive: RAM x lost length, mean of {BLOCK} keys": (ram, {"order": 2, "prior": ram, "keys": "mean"}),
    }
    for name, (quotas, settings) in adaptive.items():
        rows[name] = {}
        for k in KS:
            policy = QueryAwareHeads(Total(k, like=quotas.top(k)), queries=QUERIES, block=BLOCK, **settings)
            rows[name][k] = tried(model, asked, policy, SHORT)
    rows["each prompt's own RAM (knows the target)"] = own = {k: Found([], [], []) for k in KS}
    for prompt in asked:
        scores = ram_of(model, [prompt])
        for k in KS:
            for values, one in zip(own[k], tried_static(model, [prompt], scores.top(k), SHORT), strict=True):
                values += one
    return rows


def some_need_none(model: HookedMLLM, known: Sequence[Prompt], asked: Sequence[Prompt]) -> dict[str, dict[int, Found]]:
    """Policies at equal mean numbers of heads; the window holds the target of some prompts."""
    ram = ram_of(model, known)
    rows = {BASE: {k: tried_static(model, asked, ram.top(k), LONG) for k in range(2 * max(MEANS) + 1)}}
    for keys in ("exact", "mean"):
        name = "adaptive: RAM x lost length" + ("" if keys == "exact" else f", mean of {BLOCK} keys")
        rows[name] = {}
        for k in MEANS:
            budget = Total(2 * k, like=ram.top(2 * k))
            policy = partial(QueryAwareHeads, budget, queries=QUERIES, block=BLOCK, order=2, prior=ram, keys=keys)
            above = sorted(chosen_scores(model, known, policy()), reverse=True)
            # k heads a known prompt: half-way between the last score that is in and the first that is out
            threshold = sum(above[k * len(known) - 1 : k * len(known) + 1]) / 2
            rows[name][k] = tried(model, asked, policy(threshold=threshold), LONG)
    return rows


def chosen_scores(model: HookedMLLM, known: Sequence[Prompt], policy: Any) -> list[float]:
    """The scores of the heads that a policy without a threshold chooses on these prompts, 0 for room that it leaves."""
    found = []
    for prompt in known:
        tried(model, [prompt], policy, LONG)
        found += [choice.scores[head] for choice in policy.record.values() for head in choice.heads]
    return found + [0.0] * (policy.budget.heads * len(known) - len(found))


def estimates(model: HookedMLLM, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """How far the lost mass from blocks is from the exact one, and how many of a layer's first two heads they share."""
    exact = lost(model, samples, SHORT)
    found = {}
    for keys in ("mean", "bound", "sample"):
        errors, shared = [], []
        for one, true in zip(lost(model, samples, SHORT, keys=keys), exact, strict=True):
            errors.append(float((one.values - true.values).mean()))
            pairs = zip(one.values, true.values, strict=True)
            shared += [len({*_best(mine)} & {*_best(theirs)}) / 2 for mine, theirs in pairs]
        found[keys] = {"error": float(np.mean(errors)), "shared": float(np.mean(shared))}
    return found


def _best(values: torch.Tensor) -> list[int]:
    return values.sort(descending=True, stable=True).indices[:2].tolist()


def difference(found: Found, base: Found) -> tuple[float, float]:
    """The mean difference in log-probability over the prompts, and half its 95 % interval (normal)."""
    gap = np.subtract(found.log_prob, base.log_prob)
    return float(gap.mean()), float(1.96 * gap.std(ddof=1) / len(gap) ** 0.5)


def at_heads(rows: dict[int, Found], heads: float) -> Found:
    """What static heads give if prompts draw lots between the two next whole numbers of them: the expectation."""
    low = min(int(heads), max(rows) - 1)
    gives = (1 - heads + low) * np.array(rows[low].log_prob) + (heads - low) * np.array(rows[low + 1].log_prob)
    return Found(gives.tolist(), [], [])


def cell(found: Found, base: Found | None = None) -> str:
    """Log-probability / accuracy, and whether it differs from the base beyond the interval and by 0.01 at least."""
    sign = ""
    if base is not None:
        gap, half = difference(found, base)
        sign = "" if abs(gap) < max(half, 0.01) else " +" if gap > 0 else " -"
    return f"{np.mean(found.log_prob):.2f} / {np.mean(found.right):.2f}{sign}"


def report(results: dict[str, Any]) -> str:
    """The findings as Markdown tables."""
    heads = [f"{k} dense" for k in KS]
    lines = [f"| toy | policy | {' | '.join(heads)} |", "| --- " * (2 + len(KS)) + "|"]
    for toy, found in results.items():
        rows = found["equal"]
        for name, by_k in rows.items():
            cells = [cell(by_k[k], None if name == BASE else rows[BASE][k]) for k in KS]
            lines.append(f"| {toy} | {name} | {' | '.join(cells)} |")
    told = [
        "toy",
        "target outside",
        "policy",
        "heads used",
        "log-probability / accuracy",
        "gain over as many static",
    ]
    lines += ["", f"| {' | '.join(told)} |", "| --- " * len(told) + "|"]
    for toy, found in results.items():
        rows = found["some"]
        for name, by_k in rows.items():
            for one in by_k.values():
                used = float(np.mean(one.heads))
                gap, half = difference(one, at_heads(rows[BASE], used))
                more = "" if name == BASE else f"{gap:+.2f} ± {half:.2f}"
                lines.append(f"| {toy} | {found['outside']:.0%} | {name} | {used:.2f} | {cell(one)} | {more} |")
    lines += ["", "| toy | blocks of | mean error of the lost mass | first two heads of a layer |", "| --- " * 4 + "|"]
    for toy, found in results.items():
        for keys, one in found["estimates"].items():
            lines.append(f"| {toy} | {BLOCK}, {keys} | {one['error']:+.3f} | {one['shared']:.2f} |")
    return "\n".join(lines) + "\n"


def figure(results: dict[str, Any]) -> Figure:
    """Log-probability of the answer against dense heads used, one panel a toy; the second table."""
    drawing = Figure(figsize=(3.2 * len(results), 3.2), layout="constrained")
    for axes, (toy, found) in zip(np.atleast_1d(drawing.subplots(1, len(results))), results.items(), strict=True):
        for name, by_k in found["some"].items():
            points = sorted((np.mean(one.heads), np.mean(one.log_prob)) for one in by_k.values())
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_title(toy, fontsize="medium")
        axes.set_xlabel("dense heads a prompt (mean)")
    drawing.axes[0].set_ylabel("log-probability of the answer")
    drawing.axes[-1].legend(fontsize="x-small", loc="lower right")
    return drawing


def outside(prompt: Prompt) -> bool:
    """Whether the last token of the prompt has a part of the target outside its long window."""
    target = prompt.sample.mask("target").flatten()
    return int(target.int().argmax()) <= len(target) - 1 - LONG


def main(folder: Path, n: int) -> dict[str, Any]:
    """Measure every toy, print and write the tables."""
    ready_folder(folder)
    results: dict[str, Any] = {}
    for toy in TOYS:
        model = HookedMLLM.from_pretrained(toy, dtype="float32", check=False)
        known, asked = prompts(model, DETECTION, n), prompts(model, EVALUATION, n)
        results[toy] = {
            "equal": equal_heads(model, known, asked),
            "some": some_need_none(model, known, asked),
            "outside": float(np.mean([outside(prompt) for prompt in asked])),
            "estimates": estimates(model, [prompt.sample for prompt in asked[: 2 * len(TASKS)]]),
        }
    text = report(results)
    write_text(folder / "adaptive_routing_findings.md", text)
    plain = {
        toy: {
            **found,
            **{
                table: {name: {k: one._asdict() for k, one in by_k.items()} for name, by_k in found[table].items()}
                for table in ("equal", "some")
            },
        }
        for toy, found in results.items()
    }
    write_text(folder / "adaptive_routing.json", json.dumps({"prompts_a_task": n, "toys": plain}, indent=1) + "\n")
    write_figure(folder / "adaptive_routing.png", figure(results))
    print(text)
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(), int(sys.argv[2]) if len(sys.argv) > 2 else 12)
