"""AblationCurve: what a model can still do without its top, bottom or random heads, as more and more are taken away."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mllm.contracts import Model
from hooked_mllm.errors import HeadError, HookValueError, InputError, NumericsError
from hooked_mllm.heads import HeadSet
from hooked_mllm.heads.counting import resolve_count
from hooked_mllm.heads.head_scores import ScoresInput, check_scores
from hooked_mllm.inputs.positions import Positions
from hooked_mllm.inputs.resolve import ModelInputs, each_prepared, no_sample
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.interventions import HeadAblation, HeadReference
from hooked_mllm.interventions.base import check_choice
from hooked_mllm.measuring.measure import fingerprint
from hooked_mllm.metrics.causal.ablation_effect import ablated_positions
from hooked_mllm.metrics.causal.ablation_result import AblationCurveResult
from hooked_mllm.metrics.causal.controls import random_control
from hooked_mllm.objectives import GreedyAccuracy, Objective, as_objective, logits_at
from hooked_mllm.storage import ValueCheckpoint, ready

RANKINGS = ("top", "bottom", "random")
MODES = ("zero", "mean", "uniform")
#: numbers of heads where none are given, as far as the model has them
DEFAULT_KS = (0, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 250)


@dataclass(frozen=True)
class _Point:
    """One point of a curve: where it belongs, and which heads it takes away (None: there is no control)."""

    ranking: str
    seed: int
    k: int
    heads: HeadSet | None
    moved: int | None = None


class AblationCurve:
    r"""What a model can still do when the top k, the bottom k or k random heads of a ranking are taken away, against k.

    $$\mathrm{curve}_R(k) = \frac{1}{|D|}\sum_{x \in D} m\big(\text{model without } R_k \,\big|\, x\big)$$

    - $R_k$: the k highest (`top`) or lowest (`bottom`) heads of `scores`, or as many random ones (`random`).
    - $m$: the objective, by default whether greedy decoding gives the answer. k = 0 is the clean model.

    The random heads are a control of the top ones: as many, in the same layers, none of them among the top k, once for
    each seed. Where a layer has too few left, the rest is drawn from other layers, and `result.moved` counts them.
    Where fewer heads than k are left in all, there is no control and the curve ends (NaN).

    Answers are teacher-forced: one forward pass sees the prompt and the answer, and heads are taken away at all
    positions (`phase="both"`), at those of the prompt ("prefill": its last position, which gives the answer's first
    token, is among them) or at those of the answer ("decode"). Greedy accuracy is then what `model.generate` gives
    under `HeadAblation` with this phase. Measure on samples that the ranking was not made of.

    Args:
        scores: Ranks the heads; only measured heads take part.
        ks: Numbers of heads (int) or shares of them (float, rounded up); by default 0, 5, 10, 15, 20, 30, 40, 50, 75,
            100, 150, 200, 250, as far as the ranking goes.
        mode: What the z of an ablated head becomes: "zero", "mean" or "uniform", see `HeadAblation`.
        phase: "prefill", "decode" or "both".
        rankings: Which curves: "top", "bottom", "random".
        seeds: One random control for each.
        keep_layer_histogram: Draw controls from the same layers; False draws from all.
        exclude_ranked: Draw none of the top k; False draws from all heads, as the paper's random baseline does.
        reference: For "mean": what `HeadAblation.reference` gives, or means `[layer head d_head]`.

    Raises:
        HookValueError: for an unknown mode, phase or ranking, or a reference that is missing or not asked for.
        HeadError: for a k beyond the number of ranked heads.
        InputError: for no k, no ranking, or no seed for random heads.

    Source: arXiv:2606.05843 figure 6a, algorithm 2 (where masking a head sets its output to zero in both phases).

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> task = toys.VisualRetrieval(pages=1)
        >>> ram = model.measure(task.samples(model, 4), metrics.RetrievalAttentionMass(), progress=False)
        >>> held_out = task.samples(model, 4, start=4, answer=True)
        >>> curve = metrics.AblationCurve(ram, ks=[0, 4], rankings=["top", "bottom"])
        >>> result = curve.run(model, held_out, progress=False)
        >>> result.at("top", 4) < result.at("bottom", 4)
        True
    """

    def __init__(
        self,
        scores: ScoresInput,
        ks: Sequence[int | float] | None = None,
        *,
        mode: str = "zero",
        phase: str = "both",
        rankings: Sequence[str] = RANKINGS,
        seeds: Sequence[int] = (0, 1, 2),
        keep_layer_histogram: bool = True,
        exclude_ranked: bool = True,
        reference: HeadReference | Tensor | None = None,
    ) -> None:
        check_scores(scores, "An ablation curve")
        check_choice("mode", mode, MODES)
        check_choice("phase", phase, ("prefill", "decode", "both"))
        for ranking in rankings:
            check_choice("rankings", ranking, RANKINGS)
        if (mode == "mean") != (reference is not None):
            raise HookValueError(
                "mode='mean' needs `reference=`, what HeadAblation.reference(model, samples, heads) gives, and no "
                f"other mode takes one; got mode={mode!r}, reference={type(reference).__name__}."
            )
        self.scores, self.mode, self.phase, self.reference = scores, mode, phase, reference
        self.rankings, self.seeds = tuple(dict.fromkeys(rankings)), tuple(dict.fromkeys(seeds))
        self.keep_layer_histogram, self.exclude_ranked = keep_layer_histogram, exclude_ranked
        count = len(scores.ranking)
        asked = [k for k in DEFAULT_KS if k <= count] if ks is None else ks
        self.ks = tuple(sorted({resolve_count(k, count, "ranked heads") for k in asked}))
        if not self.ks or not self.rankings or not self.seeds:
            raise InputError(
                f"An ablation curve needs a k, a ranking and a seed at least; got {ks=}, {rankings=}, {seeds=}."
            )

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        plain = ("mode", "phase", "keep_layer_histogram", "exclude_ranked")
        config: dict[str, Any] = {name: getattr(self, name) for name in plain}
        if isinstance(self.reference, HeadReference):
            config["reference"] = self.reference.describe()
        return config | {"ks": list(self.ks), "rankings": list(self.rankings), "seeds": list(self.seeds)}

    def points(self) -> list[_Point]:
        """Every point of every curve, with its heads."""
        points = []
        for ranking in self.rankings:
            for seed in self.seeds if ranking == "random" else (0,):
                for k in self.ks:
                    points.append(self._point(ranking, seed, k))
        return points

    def _point(self, ranking: str, seed: int, k: int) -> _Point:
        if ranking != "random":
            return _Point(ranking, seed, k, getattr(self.scores, ranking)(k))
        keep, exclude = self.keep_layer_histogram, self.exclude_ranked
        control = random_control(
            self.scores, self.scores.top(k), seed, keep_layer_histogram=keep, exclude_ranked=exclude
        )
        return _Point(ranking, seed, k, control and control.heads, control and control.moved)

    def run(
        self,
        model: Model,
        samples: ModelInputs,
        *,
        objective: Any = None,
        batch_size: int = 8,
        checkpoint: str | Path | None = None,
        save_every: int = 50,
        progress: bool = True,
    ) -> AblationCurveResult:
        """Measure the curves: one forward pass for each batch of samples and each set of heads.

        Args:
            model: A `HookedMLLM`.
            samples: Samples or batches, one or several; for the default objective prepared with `answer=`. Those of a
                batch are run like samples by themselves.
            objective: An objective, or a function of the last prompt position's logits; by default `GreedyAccuracy()`.
            batch_size: Samples run together, padded on the left.
            checkpoint: A file in which the values are kept every `save_every` passes and when interrupted; a later call
                with the same samples, settings and file goes on where that one stopped.
            save_every: Forward passes between two savings.
            progress: Show a progress bar.

        Raises:
            InputError: for no sample, inputs that are no samples, or answers that are missing.
            HeadError: when the ranking is of a model of another shape.
            CacheFileError: for the checkpoint of another run.
            NumericsError: when the objective is not finite.
        """
        ready(checkpoint)
        chosen = list(each_prepared(samples))
        if not chosen:
            raise no_sample("ablate heads on")
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more; got {batch_size}.")
        if self.scores.shape != (model.cfg.n_layers, model.cfg.n_heads):
            raise HeadError(
                f"The ranking is of a model of {self.scores.shape} (layers, heads), the model at hand has "
                f"{(model.cfg.n_layers, model.cfg.n_heads)}."
            )
        goal = GreedyAccuracy() if objective is None else as_objective(objective)
        points = self.points()
        sets = list(dict.fromkeys(p.heads for p in points if p.heads is not None))
        identity = {
            "curve": self.config(),
            "objective": goal.describe(),
            "model": model.info.provenance(),
            "sets": [str(heads) for heads in sets],
            "samples": [fingerprint(s) for s in chosen] if checkpoint is not None else [],
        }
        state = ValueCheckpoint(checkpoint, identity, (len(sets), len(chosen)))
        bar = tqdm(total=len(sets) * len(chosen), desc="ablating heads", unit="run", disable=not progress)
        try:
            for start in range(0, len(chosen), batch_size):
                part = slice(start, min(start + batch_size, len(chosen)))
                self._batch(model, chosen[part], goal, sets, state.values[:, part], state, save_every, bar)
        finally:
            state.save()
            bar.close()
        return self._result(model, chosen, goal, points, {heads: state.values[i] for i, heads in enumerate(sets)})

    def _batch(
        self,
        model: Model,
        samples: list[Sample],
        goal: Objective,
        sets: list[HeadSet],
        values: np.ndarray,
        state: ValueCheckpoint,
        save_every: int,
        bar: Any,
    ) -> None:
        """Fill in what is missing of `values` [set sample], a part of the state's."""
        bar.update(int((~np.isnan(values).any(1)).sum()) * len(samples))
        if not np.isnan(values).any():
            return
        inputs = model.resolve(SampleBatch.collate(samples))
        bound = goal.bind(model, inputs)
        if goal.needs_clean:
            with torch.no_grad():
                bound = bound.with_clean(logits_at(model, inputs, bound.positions))
        where = ablated_positions(inputs, self.phase, None)
        for i, heads in enumerate(sets):
            if not np.isnan(values[i]).any():
                continue
            with torch.no_grad(), model.intervene(*self._ablation(heads, where)):
                result = bound(logits_at(model, inputs, bound.positions)).double().cpu().numpy()
            if not np.isfinite(result).all():
                names = [s.id or f"number {n}" for n, s in enumerate(samples) if not np.isfinite(result[n])]
                raise NumericsError(f"The objective is not finite without {heads}, for {', '.join(names)}.")
            values[i] = result
            bar.update(len(samples))
            state.tick(save_every)

    def _ablation(self, heads: HeadSet, where: Positions | None) -> list[HeadAblation]:
        if not heads:
            return []
        # teacher-forced answers stand in the prefill: `where` tells them from the prompt
        return [HeadAblation(heads, mode=self.mode, phase="prefill", positions=where, reference=self.reference)]

    def _result(
        self,
        model: Model,
        samples: list[Sample],
        goal: Objective,
        points: list[_Point],
        found: dict[HeadSet, np.ndarray],
    ) -> AblationCurveResult:
        absent = np.full(len(samples), np.nan)
        per_sample, heads, moved = {}, {}, []
        for ranking in self.rankings:
            own = [p for p in points if p.ranking == ranking]
            rows = [own[i : i + len(self.ks)] for i in range(0, len(own), len(self.ks))]  # one for each seed
            per_sample[ranking] = np.array([[absent if p.heads is None else found[p.heads] for p in r] for r in rows])
            heads[ranking] = [[None if p.heads is None else str(p.heads) for p in r] for r in rows]
            if ranking == "random":
                moved = [[p.moved for p in r] for r in rows]
        ids = [s.id for s in samples if s.id is not None]
        provenance = {
            "metric": type(self).__name__,
            "config": self.config(),
            "objective": goal.describe(),
            "ranking": {"name": self.scores.name, "provenance": self.scores.provenance},
            "n_samples": len(samples),
            **({"sample_ids": ids} if ids else {}),
            **model.info.provenance(),
        }
        name = type(goal).__name__
        return AblationCurveResult(self.ks, per_sample, heads, moved, name, goal.larger_is_better, provenance)

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in self.config().items())
        return f"AblationCurve({self.scores.name}, {told})"
