"""What causal metrics that go through many variants of a run share: samples, checkpoint, progress, provenance."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mllm.contracts import Model
from hooked_mllm.inputs.resolve import ResolvedInput, samples_of, sequence_count
from hooked_mllm.measuring.measure import fingerprint
from hooked_mllm.objectives import BoundObjective, Objective, as_objective, logits_at
from hooked_mllm.storage import ValueCheckpoint
from hooked_mllm.sweep import Sweep

#: batches between two savings of a checkpoint
SAVE_EVERY = 20


class SweptMetric(ABC):
    """Runs samples, or pairs of them, in many variants, and keeps the objective of each: `[variant sample]`.

    A subclass says what the variants are, and makes scores of the values.
    """

    #: what the progress bar says
    doing = "running variants"
    #: whether it takes pairs (clean, corrupted)
    paired = False

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""

    @abstractmethod
    def count(self, model: Model, items: Sequence[Any]) -> int:
        """How many variants a sample has; refuses settings that do not fit the model."""

    @abstractmethod
    def values(self, job: "Job") -> None:
        """Put the objectives of one item's variants into `job`."""

    def sweep(
        self,
        model: Model,
        items: Sequence[Any],
        objective: Any,
        *,
        checkpoint: str | Path | None,
        batch_size: int | None,
        compile: bool,
        progress: bool,
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Objectives of whole runs `[run sample]` (clean, and corrupted for pairs), of variants, and the provenance."""
        goal = as_objective(objective)
        count, runs = self.count(model, items), 2 if self.paired else 1
        base_inputs = [item[0] if self.paired else item for item in items]
        widths = [sequence_count(source) for source in base_inputs]
        facts = {
            "metric": type(self).__name__,
            "config": self.config(),
            "objective": goal.describe(),
            **model.info.provenance(),
        }
        identity = {**facts, "samples": []}
        if checkpoint is not None:
            identity["samples"] = [[fingerprint(s) for s in (item if self.paired else (item,))] for item in items]
        state = ValueCheckpoint(checkpoint, identity, (runs + count, sum(widths)))
        bar = tqdm(total=count * len(items), desc=self.doing, unit="variant", disable=not progress)
        start = 0
        try:
            for item, width in zip(items, widths, strict=True):
                part = state.values[:, start : start + width]
                job = Job(model, item, items, goal, part[:runs], part[runs:], state, bar, batch_size, compile)
                job.skip_known()
                if not job.finished:
                    self.values(job)
                start += width
        finally:
            state.save()
            bar.close()
        ids = [sample.id for source in base_inputs for sample in samples_of(source) if sample.id is not None]
        facts["n_samples"] = sum(widths)
        return state.values[:runs], state.values[runs:], {**facts, **({"sample_ids": ids} if ids else {})}


class Job:
    """One sample, batch or pair of a sweep, and where its values go.

    Attributes:
        runs: Objectives of the whole runs `[run sample]`, NaN until known.
        variants: Those of the variants `[variant sample]`, NaN until known.
    """

    def __init__(
        self,
        model: Model,
        item: Any,
        items: Sequence[Any],
        goal: Objective,
        runs: np.ndarray,
        variants: np.ndarray,
        state: ValueCheckpoint,
        bar: Any,
        batch_size: int | None,
        compile: bool,
    ) -> None:
        self.model, self.item, self.items, self.goal = model, item, items, goal
        self.runs, self.variants = runs, variants
        self.state, self.bar, self.batch_size, self.compile = state, bar, batch_size, compile

    @property
    def finished(self) -> bool:
        """Whether nothing is missing."""
        return not (np.isnan(self.variants).any() or np.isnan(self.runs).any())

    def known(self, number: int) -> bool:
        """Whether a variant's values are there already."""
        return not bool(np.isnan(self.variants[number]).any())

    def skip_known(self) -> None:
        """Let the progress bar pass what a checkpoint held."""
        self.bar.update(int((~np.isnan(self.variants).any(1)).sum()))

    def store(self, numbers: list[int], values: Tensor) -> None:
        """Keep the values of a batch of variants."""
        self.variants[numbers] = values.numpy()
        self.bar.update(len(numbers))
        self.state.tick(SAVE_EVERY)

    def engine(self, inputs: Any, objective: Objective | BoundObjective) -> Sweep:
        """A sweep over variants of one run."""
        return Sweep(self.model, inputs, objective, batch_size=self.batch_size, compile=self.compile)

    def bound(self, clean: ResolvedInput, corrupted: ResolvedInput) -> tuple[BoundObjective, Tensor, Tensor]:
        """The objective of a pair, and its values on either run."""
        bound = self.goal.bind(self.model, clean, corrupted)
        with torch.no_grad():
            logits = [logits_at(self.model, inputs, bound.positions) for inputs in (clean, corrupted)]
            if self.goal.needs_clean:
                bound = bound.with_clean(logits[0])
            values = [bound(x).double().cpu() for x in logits]
        return bound, values[0], values[1]
