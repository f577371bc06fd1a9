"""AblationCurve: an objective against the number of ablated heads of a ranking."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model, Phase
from hooked_mllm.errors import HeadError, HookValueError, InputError, NumericsError
from hooked_mllm.heads import HeadSet
from hooked_mllm.heads.counting import Count, Seed, check_seed, resolve_count
from hooked_mllm.heads.head_scores import ScoresInput, check_scores
from hooked_mllm.inputs.resolve import ModelInputs, each_prepared, no_sample
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.interventions import HeadAblation, HeadReference
from hooked_mllm.interventions.base import check_choice
from hooked_mllm.measuring.measure import fingerprint
from hooked_mllm.metrics.causal.ablation_effect import ablated_positions
from hooked_mllm.metrics.causal.ablation_result import AblationCurveResult
from hooked_mllm.metrics.causal.controls import random_control
from hooked_mllm.objectives import GreedyAccuracy, Objective, as_objective, logits_at
from hooked_mllm.objectives.function import ObjectiveLike
from hooked_mllm.storage import ValueCheckpoint, ready

if TYPE_CHECKING:
    #: the heads of a curve
    Ranking = Literal["top", "bottom", "random"]
    #: the replacement of a head's z
    Mode = Literal["zero", "mean", "uniform"]
else:
    Ranking = Mode = str

RANKINGS: tuple[Ranking, ...] = ("top", "bottom", "random")
MODES = ("zero", "mean", "uniform")
#: numbers of heads by default, up to that of ranked heads
DEFAULT_KS = (0, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 200, 250)


@dataclass(frozen=True)
class _Point:
    """A point of a curve, with the ablated heads; None if there is no control."""

    ranking: Ranking
    seed: int
    k: int
    heads: HeadSet | None
    moved: int | None = None


@checked
class AblationCurve:
    r"""An objective with the top k, the bottom k or k random heads of a ranking ablated, against k.

    $$\mathrm{curve}_R(k) = \frac{1}{|D|}\sum_{x \in D} m\big(\text{model without } R_k \,\big|\, x\big)$$

    - $R_k$: the k highest (`top`) or lowest (`bottom`) heads of `scores`, or k random ones (`random`).
    - $m$: the objective, by default greedy accuracy. k = 0 is the clean model.

    The random heads are a control of the top ones: the same number in the same layers, none of them among the top k,
    once for each seed; see `random_control`. Where there is no control, the curve is NaN.

    Answers are teacher-forced in one forward pass; greedy accuracy is that of `model.generate` under `HeadAblation`
    with this phase. Use other samples than those that the ranking was measured on.

    Args:
        scores: Scores that rank the heads; only measured heads are used.
        ks: Numbers of heads (int) or shares of them (float, rounded up); by default 0, 5, 10, 15, 20, 30, 40, 50, 75,
            100, 150, 200, 250, up to the number of ranked heads.
        mode: The replacement of an ablated head's z: "zero", "mean" or "uniform", see `HeadAblation`.
        phase: The positions: those of the prompt ("prefill", with the last one, which predicts the answer's first
            token), those of the answer ("decode"), or all ("both").
        rankings: The curves: "top", "bottom", "random".
        seeds: Seeds of random controls.
        keep_layer_histogram: Draw controls from the same layers; False: from all layers.
        exclude_ranked: Draw none of the top k; False: from all heads, as the paper's random baseline.
        reference: For "mean" alone: the result of `HeadAblation.reference`, or means `[layer head d_head]`.

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
        ks: Iterable[Count] | None = None,
        *,
        mode: Mode = "zero",
        phase: Phase = "both",
        rankings: Iterable[Ranking] = RANKINGS,
        seeds: Iterable[Seed] = (0, 1, 2),
        keep_layer_histogram: bool = True,
        exclude_ranked: bool = True,
        reference: HeadReference | Tensor | None = None,
    ) -> None:
        check_scores(scores, "An ablation curve")
        check_choice("mode", mode, MODES)
        check_choice("phase", phase, ("prefill", "decode", "both"))
        rankings = tuple(rankings)
        for ranking in rankings:
            check_choice("rankings", ranking, RANKINGS)
        if (mode == "mean") != (reference is not None):
            raise HookValueError(
                "mode='mean' needs `reference=`, the result of HeadAblation.reference(model, samples, heads), and no "
                f"other mode takes one; got mode={mode!r}, reference={type(reference).__name__}."
            )
        self.scores, self.mode, self.reference = scores, mode, reference
        self.phase: Phase = phase
        self.rankings, self.seeds = tuple(dict.fromkeys(rankings)), tuple(dict.fromkeys(map(check_seed, seeds)))
        self.keep_layer_histogram, self.exclude_ranked = keep_layer_histogram, exclude_ranked
        count = len(scores.ranking)
        ks = [k for k in DEFAULT_KS if k <= count] if ks is None else ks
        self.ks = tuple(sorted({resolve_count(k, count, "ranked heads") for k in ks}))
        if not self.ks or not self.rankings or not self.seeds:
            raise InputError(
                f"An ablation curve needs at least a k, a ranking and a seed; got {ks=}, {rankings=}, {seeds=}."
            )

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        names = ("mode", "phase", "keep_layer_histogram", "exclude_ranked")
        config: dict[str, Any] = {name: getattr(self, name) for name in names}
        if isinstance(self.reference, HeadReference):
            config["reference"] = self.reference.describe()
        return config | {"ks": list(self.ks), "rankings": list(self.rankings), "seeds": list(self.seeds)}

    def points(self) -> list[_Point]:
        """Every point of every curve, with its heads."""
        return [
            self._point(ranking, seed, k)
            for ranking in self.rankings
            for seed in (self.seeds if ranking == "random" else (0,))
            for k in self.ks
        ]

    def _point(self, ranking: Ranking, seed: int, k: int) -> _Point:
        if ranking != "random":
            return _Point(ranking, seed, k, getattr(self.scores, ranking)(k))
        keep, exclude, top = self.keep_layer_histogram, self.exclude_ranked, self.scores.top(k)
        control = random_control(self.scores, top, seed, keep_layer_histogram=keep, exclude_ranked=exclude)
        return _Point(ranking, seed, k, control and control.heads, control and control.moved)

    def run(
        self,
        model: Model,
        samples: ModelInputs,
        *,
        objective: ObjectiveLike | None = None,
        batch_size: int = 8,
        checkpoint: str | PathLike[str] | None = None,
        save_every: int = 50,
        progress: bool = True,
    ) -> AblationCurveResult:
        """Measure the curves: one forward pass for each batch of samples and each set of heads.

        Args:
            model: A `HookedMLLM`.
            samples: Samples or batches, one or several; for the default objective prepared with `answer=`.
            objective: An objective, or a function of the last prompt position's logits; by default `GreedyAccuracy()`.
            batch_size: Samples run together, padded on the left; batches in `samples` are split.
            checkpoint: A file for the values; see `AblationEffect.run`.
            save_every: Forward passes between two savings.
            progress: Show a progress bar.

        Raises:
            HeadError: If the ranking is of a model of another shape.
            CacheFileError: For the checkpoint of another run.
            NumericsError: If the objective is not finite.
        """
        ready(checkpoint)
        prepared = list(each_prepared(samples))
        if not prepared:
            raise no_sample("ablate heads on")
        if batch_size < 1:
            raise InputError(f"batch_size must be 1 or more; got {batch_size}.")
        shape = model.cfg.n_layers, model.cfg.n_heads
        if self.scores.shape != shape:
            raise HeadError(f"The ranking is of a model of {self.scores.shape} (layers, heads); this one has {shape}.")
        goal = GreedyAccuracy() if objective is None else as_objective(objective)
        points = self.points()
        sets = list(dict.fromkeys(p.heads for p in points if p.heads is not None))
        identity = {
            "curve": self.config(),
            "objective": goal.describe(),
            "model": model.info.provenance(),
            "sets": [str(heads) for heads in sets],
            "samples": [fingerprint(s) for s in prepared] if checkpoint is not None else [],
        }
        state = ValueCheckpoint(checkpoint, identity, (len(sets), len(prepared)))
        bar = tqdm(total=state.values.size, desc="ablating heads", unit="run", disable=not progress)
        try:
            for start in range(0, len(prepared), batch_size):
                batch = prepared[start : start + batch_size]
                values = state.values[:, start : start + batch_size]  # [set sample], a view
                missing = np.flatnonzero(np.isnan(values).any(1))
                bar.update((len(sets) - len(missing)) * len(batch))
                measured = self._measured(model, batch, goal, [sets[index] for index in missing])
                for index, of_set in zip(missing, measured, strict=True):
                    values[index] = of_set
                    bar.update(len(batch))
                    state.tick(save_every)
        finally:
            state.save()
            bar.close()
        return self._result(model, prepared, goal, points, dict(zip(sets, state.values, strict=True)))

    def _measured(
        self, model: Model, samples: list[Sample], goal: Objective, sets: list[HeadSet]
    ) -> Iterator[Float[np.ndarray, " sample"]]:
        """The objective of a batch without each set of heads."""
        if not sets:
            return
        inputs = model.resolve(SampleBatch.collate(samples))
        bound = goal.bind(model, inputs)
        if goal.needs_clean:
            with torch.no_grad():
                bound = bound.with_clean(logits_at(model, inputs, bound.positions))
        # teacher-forced answers are part of the prefill: positions distinguish them from the prompt
        positions = ablated_positions(inputs, self.phase, None)
        settings = {"mode": self.mode, "phase": "prefill", "positions": positions, "reference": self.reference}
        for heads in sets:
            ablations = [HeadAblation(heads, **settings)] if heads else []
            with torch.no_grad(), model.intervene(*ablations):
                values = bound(logits_at(model, inputs, bound.positions)).double().cpu().numpy()
            if not np.isfinite(values).all():
                names = [str(s.id or f"number {n}") for n, s in enumerate(samples) if not np.isfinite(values[n])]
                raise NumericsError(f"The objective is not finite without {heads}, for {', '.join(names)}.")
            yield values

    def _result(
        self,
        model: Model,
        samples: list[Sample],
        goal: Objective,
        points: list[_Point],
        values: dict[HeadSet, Float[np.ndarray, " sample"]],
    ) -> AblationCurveResult:
        absent, n = np.full(len(samples), np.nan), len(self.ks)
        per_sample, heads, moved = {}, {}, []
        for ranking in self.rankings:
            of_ranking = [p for p in points if p.ranking == ranking]
            seeds = [of_ranking[i : i + n] for i in range(0, len(of_ranking), n)]  # [seed][k]
            per_sample[ranking] = np.array([[absent if p.heads is None else values[p.heads] for p in s] for s in seeds])
            heads[ranking] = [[None if p.heads is None else str(p.heads) for p in s] for s in seeds]
            moved = [[p.moved for p in s] for s in seeds] if ranking == "random" else moved
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
        settings = ", ".join(f"{name}={value!r}" for name, value in self.config().items())
        return f"AblationCurve({self.scores.name}, {settings})"
