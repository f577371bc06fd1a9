"""Base classes of causal metrics that run many variants: checkpoint, progress, provenance, normalised effects."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mllm.contracts import Model
from hooked_mllm.corruptions.pair import Pairs, as_pairs
from hooked_mllm.errors import NumericsError
from hooked_mllm.heads import HeadScores
from hooked_mllm.inputs.resolve import ModelInput, samples_of, sequence_count
from hooked_mllm.interventions.base import layers_of
from hooked_mllm.measuring.measure import fingerprint
from hooked_mllm.objectives import BoundObjective, Objective, as_objective, logits_at
from hooked_mllm.objectives.function import ObjectiveLike
from hooked_mllm.storage import ValueCheckpoint, ready
from hooked_mllm.sweep import Sweep

if TYPE_CHECKING:
    #: "denoising" patches clean activations into the corrupted run, "noising" corrupted ones into the clean run
    Direction = Literal["denoising", "noising"]
else:
    Direction = str

#: an input, or something else of a run
Run = TypeVar("Run")
#: batches between two savings of a checkpoint
SAVE_EVERY = 20


class SweepOptions(TypedDict, total=False):
    """How variants are run; see `AblationEffect.run`."""

    checkpoint: str | PathLike[str] | None
    batch_size: int | None
    compile: bool
    progress: bool


class SweptMetric(ABC):
    """Computes the objective of many variants of samples, or of pairs: `[variant sample]`."""

    #: description of the progress bar
    doing = "running variants"
    #: whether it takes pairs (clean, corrupted)
    paired = False
    #: the layers that are measured; None for all
    layers: int | tuple[int, ...] | None = None

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""

    @abstractmethod
    def count(self, model: Model, items: Sequence[Any]) -> int:
        """Number of variants of a sample; raises for settings that the model does not support."""

    @abstractmethod
    def values(self, job: "Job") -> None:
        """Compute the objectives of an item's variants and store them in `job`."""

    def sweep(
        self,
        model: Model,
        items: Sequence[Any],
        objective: ObjectiveLike,
        *,
        checkpoint: str | PathLike[str] | None,
        batch_size: int | None,
        compile: bool,
        progress: bool,
    ) -> tuple[Float[np.ndarray, "run sample"], Float[np.ndarray, "variant sample"], dict[str, Any]]:
        """Objectives of whole runs (clean, and corrupted for pairs) and of variants, and the provenance."""
        goal = as_objective(objective)
        count, runs = self.count(model, items), 2 if self.paired else 1
        sources = [item if self.paired else (item,) for item in items]
        widths = [sequence_count(source[0]) for source in sources]
        facts = {
            "metric": type(self).__name__,
            "config": self.config(),
            "objective": goal.describe(),
            **model.info.provenance(),
        }
        samples = [[fingerprint(s) for s in source] for source in sources] if checkpoint is not None else []
        state = ValueCheckpoint(checkpoint, {**facts, "samples": samples}, (runs + count, sum(widths)))
        bar = tqdm(total=count * len(items), desc=self.doing, unit="variant", disable=not progress)
        try:
            for item, values in zip(items, np.split(state.values, np.cumsum(widths)[:-1], axis=1), strict=True):
                bar.update(int((~np.isnan(values[runs:]).any(1)).sum()))
                if np.isnan(values).any():  # the job fills views of `state.values`
                    job = Job(model, item, items, goal, values[:runs], values[runs:], state, bar, batch_size, compile)
                    self.values(job)
        finally:
            state.save()
            bar.close()
        facts["n_samples"] = sum(widths)
        for number, name in enumerate(("sample_ids", "corrupted_ids")[:runs]):
            ids = [sample.id for source in sources for sample in samples_of(source[number]) if sample.id is not None]
            facts |= {name: ids} if ids else {}
        if self.paired:  # a corrupted sample has the id of the clean one
            facts["corrupted_inputs"] = [fingerprint(source[-1]) for source in sources]
        return state.values[:runs], state.values[runs:], facts

    def _layers_config(self) -> int | list[int] | None:
        return [*self.layers] if isinstance(self.layers, tuple) else self.layers

    def _layers(self, model: Model) -> list[int]:
        count = model.cfg.n_layers
        return [*range(count)] if self.layers is None else layers_of(self.layers, count, "text")

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.config().items() if value is not None)
        return f"{type(self).__name__}({settings})"


class PairedMetric(SweptMetric):
    """A swept metric of pairs: activations of the source run are patched into the base run."""

    paired = True
    direction: Direction
    normalise: bool

    def _base_and_source(self, clean: Run, corrupted: Run) -> tuple[Run, Run]:
        """The run that is patched, and the one whose activations are used."""
        return (corrupted, clean) if self.direction == "denoising" else (clean, corrupted)

    def _effects(
        self, model: Model, pairs: Pairs, objective: ObjectiveLike, options: SweepOptions
    ) -> tuple[list[Any], Float[np.ndarray, " variant"], dict[str, Any]]:
        """The pairs as a list, the effect of each variant, and the provenance."""
        ready(options.get("checkpoint"))
        items = as_pairs(pairs)
        (clean, corrupted), patched, facts = self.sweep(model, items, objective, **options)
        base, sign = (corrupted, 1.0) if self.direction == "denoising" else (clean, -1.0)
        change = sign * (patched - base).sum(1)  # [variant sample] -> [variant]
        # a share of the difference of the runs has the sign of neither; a plain change is one for the better
        mean = len(clean) if as_objective(objective).larger_is_better else -len(clean)
        whole = float((clean - corrupted).sum()) if self.normalise else mean
        if abs(whole) < 1e-9:
            raise NumericsError(
                "The clean and the corrupted runs have the same objective, so that effects cannot be a share of the "
                "difference: use a stronger corruption, another objective, or normalise=False."
            )
        return items, change / whole, {**facts, "clean": float(clean.mean()), "corrupted": float(corrupted.mean())}

    def _head_scores(
        self,
        model: Model,
        layers: Sequence[int],
        effects: Float[np.ndarray, "layer head"],
        facts: dict[str, Any],
        name: str,
    ) -> HeadScores:
        """Effects of heads of some layers as scores of the model; the other layers are missing."""
        n_layers = model.cfg.n_layers
        values = np.full((n_layers, effects.shape[1]), np.nan)
        values[layers] = effects
        missing = [layer for layer in range(n_layers) if layer not in layers]
        counts = [0 if layer in missing else facts["n_samples"] for layer in range(n_layers)]
        return HeadScores(values, name=name, provenance=facts, counts=counts, missing=missing)


@dataclass
class Job:
    """A sample, batch or pair of a sweep, and its objectives: of whole runs and of variants, NaN until computed."""

    model: Model
    item: Any
    items: Sequence[Any]
    goal: Objective
    runs: Float[np.ndarray, "run sample"]
    variants: Float[np.ndarray, "variant sample"]
    state: ValueCheckpoint
    bar: Any
    batch_size: int | None
    compile: bool

    def known(self, number: int) -> bool:
        """Whether a variant's values are computed already."""
        return not bool(np.isnan(self.variants[number]).any())

    def store(self, numbers: list[int], values: Tensor) -> None:
        """Keep the values of a batch of variants."""
        self.variants[numbers] = values.numpy()
        self.bar.update(len(numbers))
        self.state.tick(SAVE_EVERY)

    def engine(self, inputs: ModelInput, objective: Objective | BoundObjective) -> Sweep:
        """A sweep over variants of one run."""
        return Sweep(self.model, inputs, objective, batch_size=self.batch_size, compile=self.compile)

    def run_pair(self) -> BoundObjective:
        """Store the values of both samples of a pair; returns the objective, bound to the clean sample."""
        clean, corrupted = (self.model.resolve(source) for source in self.item)
        bound = self.goal.bind(self.model, clean, corrupted)
        with torch.no_grad():
            logits = [logits_at(self.model, inputs, bound.positions) for inputs in (clean, corrupted)]
            if self.goal.needs_clean:
                bound = bound.with_clean(logits[0])
            self.runs[:] = torch.stack([bound(x).double().cpu() for x in logits]).numpy()
        return bound
