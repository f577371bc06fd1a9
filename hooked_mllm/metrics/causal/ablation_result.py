"""The result of an ablation curve: the value of every sample for every number of ablated heads."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from hooked_mllm.checks import checked
from hooked_mllm.display.blocks import html_block, html_table
from hooked_mllm.display.text import text_table
from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.heads.counting import Seed
from hooked_mllm.heads.intervals import MIN_SAMPLES, are_shares, mean_interval
from hooked_mllm.storage import from_lists, read_json, restoring, to_lists, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is imported when something is drawn
    Figure = Any

KIND = "hooked_mllm.AblationCurve"


@checked
@dataclass(frozen=True, eq=False)
class AblationCurveResult:
    """An objective against the number of ablated heads, for each ranking; `AblationCurve.run` measures it.

    Attributes:
        ks: Numbers of heads, ascending.
        per_sample: The objective of every sample by ranking, `[seed k sample]`; NaN where there is no control.
        heads: The ablated heads by ranking, `[seed][k]` as text; None where there is no control.
        moved: Number of random heads in other layers than the ranked heads, `[seed][k]`.
        objective: Name of the objective.
        larger_is_better: Whether larger values mean a better model.
        provenance: Model, ranking, settings, objective, sample ids, versions.

    Examples:
        >>> values = {"top": np.array([[[1.0, 1.0], [0.0, 1.0]]])}
        >>> curve = AblationCurveResult(ks=(0, 4), per_sample=values, heads={"top": [["", "L0H0, L0H1, L1H0, L1H2"]]})
        >>> curve.at("top", 4), curve.clean
        (0.5, 1.0)
    """

    ks: tuple[int, ...]
    per_sample: dict[str, Float[np.ndarray, "seed k sample"]]
    heads: dict[str, list[list[str | None]]]
    moved: list[list[int | None]] = field(default_factory=list)
    objective: str = "objective"
    larger_is_better: bool = True
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def rankings(self) -> tuple[str, ...]:
        """The rankings measured."""
        return tuple(self.per_sample)

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return next(iter(self.per_sample.values())).shape[2]

    @property
    def values(self) -> dict[str, Float[np.ndarray, "seed k"]]:
        """The mean over samples, by ranking."""
        return {name: values.mean(2) for name, values in self.per_sample.items()}

    @property
    def clean(self) -> float | None:
        """The mean without ablation; None if k = 0 was not measured."""
        return float(next(iter(self.values.values()))[0, 0]) if self.ks[0] == 0 else None

    def mean(self, ranking: str) -> Float[np.ndarray, " k"]:
        """The mean over samples and seeds; raises an InputError for a ranking that was not measured."""
        return self._of(ranking).mean((0, 2))

    def at(self, ranking: str, k: int) -> float:
        """The mean over samples and seeds with `k` heads ablated; raises a HeadError for a k that was not measured."""
        if k not in self.ks:
            raise HeadError(f"{k} heads were not ablated; the curve has k in {list(self.ks)}.")
        return float(self.mean(ranking)[self.ks.index(k)])

    def interval(
        self, ranking: str, level: float = 0.95, n: int = 1000, seed: Seed = 0
    ) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        r"""An interval around the mean: (low, high) for each k, as `heads.bootstrap` computes it; NaN without control.

        It covers the choice of samples, not that of the controls' heads. It is Clopper and Pearson's for
        `GreedyAccuracy`, and where all values of the curve are 0 or 1 and some are 1.

        Raises:
            InputError: For fewer than 5 samples, a level that is not between 0 and 1, or no draw.
        """
        curves = np.concatenate([values.ravel() for values in self.per_sample.values()])
        bounded = self.objective.startswith("GreedyAccuracy") or are_shares(curves)
        return mean_interval(self._of(ranking).mean(0).T, level, n, seed, bounded)  # [seed k sample] -> [sample k]

    def table(self) -> str:
        """Mean and 95 % interval for each k, as text; means alone of fewer samples than an interval needs."""
        header, *lines = self._cells()
        return text_table([header, *lines], align=">" * len(header), least=(5, *[20] * len(self.rankings)))

    def _repr_html_(self) -> str:
        header, *lines = self._cells()
        title = f"AblationCurveResult: {self.objective}, {self.n_samples} samples"
        return html_block(title, html_table(lines, header, align=">" * len(header)))

    def _cells(self) -> list[tuple[str, ...]]:
        """The header, then k with mean and interval of each ranking."""
        columns = [("heads", *map(str, self.ks))]
        for name in self.rankings:
            mean = self.mean(name)
            cells = [f"{m:.3f}" for m in mean]
            if self.n_samples >= MIN_SAMPLES:
                ends = zip(cells, *self.interval(name), strict=True)
                cells = [f"{cell} [{low:.3f}, {high:.3f}]" for cell, low, high in ends]
            cells = ["-" if np.isnan(m) else cell for m, cell in zip(mean, cells, strict=True)]
            columns.append((name, *cells))
        return list(zip(*columns, strict=True))

    def plot(
        self, *, chance: float | int | None = None, level: float | None = 0.95, title: str | None = None
    ) -> Figure:
        """Draw the curves with `hooked_mllm.plots.ablation_curves`."""
        from hooked_mllm.plots import ablation_curves

        return ablation_curves(self, chance=chance, level=level, title=title)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON; raises a CacheFileError if that is not possible."""
        content = {
            "ks": list(self.ks),
            "per_sample": {name: to_lists(values) for name, values in self.per_sample.items()},
            **{name: getattr(self, name) for name in _PLAIN},
        }
        write_json(Path(path), KIND, content)

    @classmethod
    def load(cls, path: str | Path) -> "AblationCurveResult":
        """Read a file of `save`; raises a CacheFileError if it is missing, damaged, a pickle, or of another kind."""
        content = read_json(Path(path), KIND)
        with restoring(path):
            per_sample = {name: from_lists(values) for name, values in content["per_sample"].items()}
            ks = tuple(int(k) for k in content["ks"])
            shapes = [v.shape for v in per_sample.values()]
            if not shapes or any(len(s) != 3 or s[1:] != (len(ks), shapes[0][2]) for s in shapes):
                raise ValueError("its parts do not fit together")
            return cls(ks, per_sample, **{name: content[name] for name in _PLAIN})

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {self.values[name].mean(0)[-1]:.3f}" for name in self.rankings)
        return (
            f"AblationCurveResult({self.objective}, k from {self.ks[0]} to {self.ks[-1]}, {self.n_samples} samples; "
            f"at k={self.ks[-1]}: {last})"
        )

    def _of(self, ranking: str) -> np.ndarray:
        if ranking not in self.per_sample:
            raise InputError(f"Expected one of the rankings {', '.join(self.rankings)}; got {ranking!r}.")
        return self.per_sample[ranking]


_PLAIN = ("heads", "moved", "objective", "larger_is_better", "provenance")
