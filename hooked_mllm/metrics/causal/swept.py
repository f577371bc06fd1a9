"""The base of causal metrics that run many variants: samples, checkpoint, progress, provenance, normalised effects."""

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
    """Runs samples, or pairs of them, in many variants, and keeps the objective of each: `[variant sample]`.

    A subclass defines the variants and computes scores from the values.
    """

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
        """Number of variants of a sample; raises for settings that do not fit the model."""

    @abstractmethod
    def values(self, job: "Job") -> None:
        """Compute the objectives of one item's variants and store them in `job`."""

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
        start = 0
        try:
            for item, width in zip(items, widths, strict=True):
                part = state.values[:, start : start + width]
                job = Job(model, item, items, goal, part[:runs], part[runs:], state, bar, batch_size, compile)
                bar.update(job.n_known)
                if not job.finished:
                    self.values(job)
                start += width
        finally:
            state.save()
            bar.close()
        facts["n_samples"] = sum(widths)
        ids = [sample.id for source in sources for sample in samples_of(source[0]) if sample.id is not None]
        return state.values[:runs], state.values[runs:], {**facts, **({"sample_ids": ids} if ids else {})}

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
        """The run that is patched, and the run whose activations are used."""
        return (corrupted, clean) if self.direction == "denoising" else (clean, corrupted)

    def _effects(
        self, model: Model, pairs: Pairs, objective: ObjectiveLike, options: SweepOptions
    ) -> tuple[list[Any], Float[np.ndarray, " variant"], dict[str, Any]]:
        """The pairs as a list, the effect of each variant, and the provenance; raises if the two runs do not differ."""
        ready(options.get("checkpoint"))
        items = as_pairs(pairs)
        (clean, corrupted), patched, facts = self.sweep(model, items, objective, **options)
        base, sign = (corrupted, 1.0) if self.direction == "denoising" else (clean, -1.0)
        change = sign * (patched - base).sum(1)  # [variant sample] -> [variant]
        whole = float((clean - corrupted).sum()) if self.normalise else len(clean)
        if abs(whole) < 1e-9:
            raise NumericsError(
                "The clean and the corrupted runs have the same objective, so that effects cannot be a share of the "
                "difference: use a stronger corruption, another objective, or normalise=False."
            )
        return items, change / whole, {**facts, "clean": float(clean.mean()), "corrupted": float(corrupted.mean())}


@dataclass
class Job:
    """One sample, batch or pair of a sweep, and its values.

    Attributes:
        item: The sample, batch or pair.
        items: All of them.
        runs: Objectives of the whole runs `[run sample]`, NaN until computed.
        variants: Those of the variants `[variant sample]`, NaN until computed.
        state: The checkpoint that holds the values.
        bar: The progress bar.
    """

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

    @property
    def finished(self) -> bool:
        """Whether all values are computed."""
        return not (np.isnan(self.variants).any() or np.isnan(self.runs).any())

    @property
    def n_known(self) -> int:
        """Number of variants whose values a checkpoint contained."""
        return int((~np.isnan(self.variants).any(1)).sum())

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
        """Run both samples of a pair and store their values; returns the objective, bound to the clean sample."""
        clean, corrupted = (self.model.resolve(source) for source in self.item)
        bound = self.goal.bind(self.model, clean, corrupted)
        with torch.no_grad():
            logits = [logits_at(self.model, inputs, bound.positions) for inputs in (clean, corrupted)]
            if self.goal.needs_clean:
                bound = bound.with_clean(logits[0])
            self.runs[:] = torch.stack([bound(x).double().cpu() for x in logits]).numpy()
        return bound
