"""SampleScores: the scores of every sample, and how far a mean or a ranking depends on the samples."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.display.blocks import html_block
from hooked_mllm.display.head_names import head_name
from hooked_mllm.display.heat import html_heat
from hooked_mllm.display.text import number_runs
from hooked_mllm.errors import HeadError, NumericsError
from hooked_mllm.heads.counting import Count, Seed, check_seed, resolve_count
from hooked_mllm.heads.head_scores import HeadScores
from hooked_mllm.heads.head_values import Numbers, as_float64
from hooked_mllm.storage import described, read_tensors, restoring, write_tensors

KIND = "hooked_mllm.SampleScores"


@checked
class SampleScores:
    """One float64 per sample and query head, [sample layer head]; `metrics.PerSample` measures them.

    Args:
        values: Scores `[sample layer head]`; a layer that was not measured is NaN in every sample.
        name: What the numbers are.
        provenance: JSON-able facts, as in `HeadScores`.

    Raises:
        HeadError: For values of another shape or without a sample.
        NumericsError: For another value that is not finite.

    Examples:
        >>> scores = SampleScores([[[0.1, 0.4]], [[0.3, 0.2]]], name="demo")
        >>> scores.mean().values.tolist()
        [[0.2, 0.30000000000000004]]
    """

    values: Tensor

    def __init__(self, values: Numbers, *, name: str = "scores", provenance: Mapping[str, Any] | None = None) -> None:
        self.values = as_float64(values, "values of shape [sample layer head]")
        if self.values.dim() != 3 or 0 in self.values.shape:
            raise HeadError(f"Expected values of shape [sample layer head]; got shape {list(self.values.shape)}.")
        self.name = name
        self.provenance = dict(provenance or {})
        gone = self.values.isnan().all(2).all(0)  # [sample layer head] -> [layer]
        self.missing: tuple[int, ...] = tuple(gone.nonzero().flatten().tolist())
        bad = ~self.values.isfinite() & ~gone[:, None]
        if bool(bad.any()):
            sample, layer, head = bad.nonzero()[0].tolist()
            head_in_sample = f"{head_name(layer, head)} in sample {sample}"
            raise NumericsError(f"{name}: {int(bad.sum())} scores are not finite, first that of {head_in_sample}.")

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        return self.values.shape[1], self.values.shape[2]

    def mean(self, samples: Sequence[int] | None = None) -> HeadScores:
        """The mean over all samples, or over those of the given numbers (one may come several times).

        Raises:
            HeadError: For no number, or a sample that is not there.
        """
        numbers = [*range(len(self))] if samples is None else list(samples)
        if not numbers or not all(0 <= number < len(self) for number in numbers):
            raise HeadError(f"Expected one or more numbers of samples from 0 to {len(self) - 1}; got {numbers}.")
        selected, ids = self.values[numbers], self.provenance.get("sample_ids", ())
        return HeadScores(
            selected.mean(0),
            name=self.name,
            provenance={**self.provenance, "n_samples": len(selected)}
            | ({"sample_ids": [ids[number] for number in numbers]} if len(ids) == len(self) else {}),
            counts=[0 if layer in self.missing else len(selected) for layer in range(self.shape[0])],
            missing=self.missing,
        )

    def draw(self, n: Count, seed: Seed) -> HeadScores:
        """The mean over `n` samples (int, 1 or more), or that share of them (float), drawn without replacement."""
        k = resolve_count(n, len(self), "samples")
        if not k:
            raise HeadError(f"The mean over no sample is not defined; got {n!r} of {len(self)}.")
        seed = check_seed(seed)
        drawn = sorted(random.Random(seed).sample(range(len(self)), k))
        scores = self.mean(drawn)
        scores.provenance |= {"seed": seed, "samples_drawn": drawn}
        return scores

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        header = {"name": self.name, "provenance": self.provenance}
        write_tensors(Path(path), KIND, {"values": self.values}, header)

    @classmethod
    def load(cls, path: str | Path) -> "SampleScores":
        """Read what `save` wrote.

        Raises:
            CacheFileError: If the file is missing, damaged, a pickle, or contains something else.
        """
        tensors, header = read_tensors(Path(path), KIND)
        with restoring(path):
            return cls(tensors["values"], **described(header))

    def _repr_html_(self) -> str:
        layers, heads = ([f"{letter}{i}" for i in range(n)] for letter, n in zip("LH", self.shape, strict=True))
        title = f"SampleScores: {self.name}, {len(self)} samples of {self.shape[0]} layers x {self.shape[1]} heads"
        note = f"layers not measured: {number_runs(self.missing)}" if self.missing else "the mean over samples"
        return html_block(title, html_heat(self.values.mean(0).numpy(), layers, heads), note=note)

    def __repr__(self) -> str:
        return f"SampleScores({self.name}, {len(self)} samples of {self.shape[0]} x {self.shape[1]} layers x heads)"
