"""HeadScores: one number per attention head, with where it came from."""

import random as random_module
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.display.blocks import html_block, html_table
from hooked_mllm.display.head_names import head_name, head_names
from hooked_mllm.display.heat import html_heat
from hooked_mllm.display.read_heads import check_in_range, read_head, whole_number
from hooked_mllm.display.text import number_runs, text_table
from hooked_mllm.errors import HeadError, InputError, NumericsError
from hooked_mllm.heads.arithmetic import Arithmetic
from hooked_mllm.heads.concentration import reached, rho_half
from hooked_mllm.heads.counting import Count, Seed, check_seed, resolve_count
from hooked_mllm.heads.grouping import Grouping
from hooked_mllm.heads.head_set import HeadSet
from hooked_mllm.heads.parsing import HeadsLike, parse_heads
from hooked_mllm.storage import (
    described,
    from_lists,
    read_json,
    read_tensors,
    ready,
    restoring,
    to_lists,
    write_json,
    write_tensors,
)

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    #: an argument that `check_scores` checks
    ScoresInput: TypeAlias = "HeadScores"
else:  # matplotlib is imported when something is drawn; scores may be anything, so that the check reports it
    Colormap = Figure = ScoresInput = Any

KIND = "hooked_mllm.HeadScores"


@checked
class HeadScores(Arithmetic, Grouping):
    """One float64 per query head of a model, ranked, compared, combined and saved.

    Arithmetic (`+ - * /` with scores or numbers, unary minus) works head by head and records its expression.

    Args:
        values: Scores of shape [layer head]; kept as float64 on the CPU.
        name: What the numbers are, such as "RetrievalAttentionMass".
        provenance: JSON-able facts, such as model, revision, metric and its settings, dataset, sample ids, versions.
        counts: Number of samples behind each score, `[layer head]` or `[layer]`.
        missing: Layers that were not measured: their values become NaN, and rankings leave them out.

    Raises:
        HeadError: For values or counts of another shape, or a missing layer that is out of range.
        NumericsError: For a value that is not finite in a layer that is not declared missing.

    Examples:
        >>> scores = HeadScores([[0.1, 0.4], [0.3, 0.2]], name="demo")
        >>> scores.top(2)
        HeadSet(2 of 2 x 2: L0H1, L1H0)
        >>> scores["L1H0"]
        0.3
    """

    @property
    def ranking(self) -> HeadSet:
        """All measured heads from the highest score to the lowest; ties in order of layer, then head."""
        return self._ordered(descending=True)

    def top(self, k: Count) -> HeadSet:
        """The `k` highest heads (int), or that share of them rounded up (float); ties to the lower layer, then head."""
        return self.ranking[: self._count(k)]

    def bottom(self, k: Count) -> HeadSet:
        """The `k` lowest heads, lowest first; ties to the lower layer, then head."""
        return self._ordered(descending=False)[: self._count(k)]

    def random(
        self,
        k: Count | None = None,
        seed: Seed = 0,
        *,
        like: HeadsLike | None = None,
        exclude: HeadsLike | None = None,
    ) -> HeadSet:
        """A control group of heads drawn at random, the same for the same seed on every machine.

        Args:
            k: How many (int) or which share (float). With `like` it may be left out.
            seed: Seed of the draw, an integer of 0 or more.
            like: Draw in each layer the number of heads that this set has there, and none of them.
            exclude: More heads that must not be drawn; the empty set allows those of `like`, too.

        Raises:
            HeadError: Without `k` and `like`, if they disagree, or if too few heads are left.
            InputError: For a seed that is no integer.
        """
        if k is None and like is None:
            raise HeadError("random() needs a number of heads, or `like=` a set of heads to copy the layers of.")
        alike = None if like is None else self._parsed(like)
        excluded = alike if exclude is None else self._parsed(exclude)
        if alike and excluded:
            excluded = excluded | alike
        draw = random_module.Random(check_seed(seed))
        order = sorted(sorted(self.ranking), key=lambda _: draw.random())
        left = [head for head in order if excluded is None or head not in excluded]
        if alike is None:
            n = self._count(k)
            if len(left) < n:
                raise HeadError(f"Expected {n} random heads, but only {len(left)} are left to draw from.")
            return self._set(left[:n])
        if k is not None and self._count(k) != len(alike):
            raise HeadError(f"k={k} disagrees with `like`, which holds {len(alike)} heads; leave k out.")
        drawn: list[tuple[int, int]] = []
        for layer, heads in alike.by_layer.items():
            candidates = [head for head in left if head[0] == layer]
            if len(candidates) < len(heads):
                raise HeadError(
                    f"Layer {layer}: `like` has {len(heads)} heads there, but only {len(candidates)} of {self.n_heads} "
                    "are left after the excluded ones. Rank fewer heads, or pass `exclude=` an empty set."
                )
            drawn += candidates[: len(heads)]
        return self._set(drawn)

    def spearman(self, other: ScoresInput) -> float:
        """Spearman rank correlation over the heads that both measured (ties share their mean rank).

        Raises:
            HeadError: If the shapes differ or fewer than two heads are measured in both.
            NumericsError: If all the scores of one are equal.
        """
        from scipy.stats import spearmanr

        self._check_comparable(other)
        both = self.measured & other.measured
        if both.sum() < 2:
            raise HeadError(f"{self.name} and {other.name} have fewer than two measured heads in common.")
        own_values, other_values = self.values[both], other.values[both]  # [layer head] -> [measured]
        for scores, values in ((self, own_values), (other, other_values)):
            if bool((values == values[0]).all()):
                raise NumericsError(f"All scores of {scores.name} are equal: a rank correlation is not defined.")
        result: Any = spearmanr(own_values.numpy(), other_values.numpy())
        return float(result.statistic)

    def overlap(self, other: ScoresInput, k: Count) -> float:
        """The share of the top `k` heads that is also in the other's top `k`, among the heads that both measured.

        Raises:
            HeadError: If the shapes differ, or for k of no heads or too many.
        """
        self._check_comparable(other)
        own_order, other_order = self.ranking & other.ranking, other.ranking & self.ranking
        n = resolve_count(k, len(own_order), "heads measured in both")
        if not n:
            raise HeadError(f"The overlap of the top {k} heads is not defined: expected at least one head.")
        return len(own_order[:n] & other_order[:n]) / n

    def percentile_mask(self, percentile: int | float = 95.0) -> Bool[Tensor, "layer head"]:
        """True where the score reaches the given percentile (0 to 100) of all scores, by linear interpolation.

        Source: arXiv:2606.05843 eq. 20.
        """
        return self.values >= reached(self.values[self.measured].numpy(), percentile)

    def mean(self, heads: HeadsLike | None = None) -> float:
        """The mean score over a group of heads; over all measured heads if none is specified.

        Raises:
            HeadError: For an empty group, one of another shape, or one with a head that was not measured.
        """
        if heads is None:
            return float(self.values[self.measured].mean())
        group = self._parsed(heads)
        if not group:
            raise HeadError("The mean over an empty set of heads is not defined.")
        return sum(self[head] for head in group) / len(group)

    def rho_half(self) -> float:
        """The least share of the heads that together hold half of all positive score; see `heads.rho_half`."""
        return rho_half(self)

    def table(self, k: int = 10) -> str:
        """The top `k` heads (all, if there are fewer) as text, one line each: rank, head, score."""
        return text_table([("rank", "head", self.name), *self._ranked(k)], align="><<", least=(4, 8))

    def _ranked(self, k: int) -> list[tuple[int, str, str]]:
        """Rank, name and score of the top `k` heads."""
        heads = self.ranking[:k]
        return [(rank, head_name(*head), f"{self[head]:.6g}") for rank, head in enumerate(heads, start=1)]

    def plot(
        self,
        top: int | float | HeadsLike | None = 10,
        *,
        title: str | None = None,
        vmin: float | int | None = None,
        vmax: float | int | None = None,
        cmap: str | Colormap | None = None,
    ) -> Figure:
        """Draw the layer x head map; the arguments are those of `hooked_mllm.plots.head_map`."""
        from hooked_mllm.plots import head_map

        return head_map(self, top, title=title, vmin=vmin, vmax=vmax, cmap=cmap)

    def save(self, path: str | Path) -> None:
        """Write `<path>.json` and `<path>.safetensors`; each contains everything. A suffix of `path` is replaced."""
        stem = Path(path)
        if not stem.name:
            raise InputError(f"Expected the path of a file, such as 'scores'; got {str(path)!r}.")
        stem = stem.with_suffix("") if stem.suffix in (".json", ".safetensors") else stem
        json_path, tensor_path = (ready(stem.with_name(stem.name + suffix)) for suffix in (".json", ".safetensors"))
        header = {"name": self.name, "missing": list(self.missing), "provenance": self.provenance}
        tensors = {"values": self.values} | ({} if self.counts is None else {"counts": self.counts})
        lists = {"values": to_lists(self.values), "counts": None if self.counts is None else to_lists(self.counts)}
        write_json(json_path, KIND, {**header, **lists})
        write_tensors(tensor_path, KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "HeadScores":
        """Read scores from a `.json` or a `.safetensors` file (the latter, if `path` has no such suffix).

        Raises:
            CacheFileError: If the file is missing, damaged, a pickle, or contains something else.
        """
        path = Path(path)
        if not path.name:
            raise InputError(f"Expected the path of a file, such as 'scores'; got {str(path)!r}.")
        if path.suffix == ".json":
            arrays = header = read_json(path, KIND)
        else:
            path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
            arrays, header = read_tensors(path, KIND)
        with restoring(path):
            values = arrays["values"] if isinstance(arrays["values"], Tensor) else from_lists(arrays["values"])
            return cls(values, counts=arrays.get("counts"), missing=header["missing"], **described(header))

    @overload
    def __getitem__(self, head: int) -> Float[Tensor, " head"]: ...
    @overload
    def __getitem__(self, head: tuple[int, int] | str) -> float: ...
    def __getitem__(self, head: object) -> float | Tensor:
        """`scores[20, 15]` or `scores["L20H15"]`: the score of one head; `scores[20]`: the scores of a layer."""
        number = whole_number(head)
        if number is not None:
            layer, _ = check_in_range(number, 0, self.shape)
            return self.values[layer].clone()
        layer, index = check_in_range(*read_head(head), self.shape)
        if layer in self.missing:
            raise HeadError(f"Layer {layer} was not measured; missing layers: {list(self.missing)}.")
        return float(self.values[layer, index])

    def __eq__(self, other: object) -> bool:
        """Same name, values, counts and missing layers. The provenance is not compared."""
        if not isinstance(other, HeadScores):
            return NotImplemented
        if self.counts is None or other.counts is None:
            same_counts = self.counts is other.counts
        else:
            same_counts = torch.equal(self.counts, other.counts)
        same_values = torch.equal(self.values.nan_to_num(), other.values.nan_to_num())
        return same_values and same_counts and (self.name, self.missing) == (other.name, other.missing)

    __hash__ = None  # type: ignore[assignment]  # provenance may be added to

    def __repr__(self) -> str:
        heads = self.ranking[:3]
        best = ", ".join(f"{head_name(*head)} {self[head]:.3g}" for head in heads)
        missing = f", missing layers {list(self.missing)}" if self.missing else ""
        return f"HeadScores({self.name}, {self._size()} layers x heads{missing}, top: {best})"

    def _repr_html_(self) -> str:
        layers, heads = ([f"{letter}{i}" for i in range(n)] for letter, n in zip("LH", self.shape, strict=True))
        return html_block(
            f"HeadScores: {self.name}, {self.n_layers} layers x {self.n_heads} heads",
            html_heat(self.values.numpy(), layers, heads),
            html_table(self._ranked(10), ("rank", "head", "score"), align="><>"),
            note=f"layers not measured: {number_runs(self.missing)}" if self.missing else "",
        )

    def _ipython_key_completions_(self) -> list[str]:
        return head_names((layer, head) for layer, head in self.measured.nonzero().tolist())

    def _count(self, k: Count | None) -> int:
        return resolve_count(k, int(self.measured.sum()), "measured heads")  # type: ignore[arg-type]  # None raises

    def _set(self, heads: Iterable[tuple[int, int]]) -> HeadSet:
        return HeadSet(heads, n_layers=self.n_layers, n_heads=self.n_heads)

    def _parsed(self, heads: HeadsLike) -> HeadSet:
        return parse_heads(heads, self.shape, whose=self.name)

    def _ordered(self, *, descending: bool) -> HeadSet:
        flat = self.values.flatten()
        order = torch.sort(flat, descending=descending, stable=True).indices
        order = order[~flat[order].isnan()]
        return self._set((int(i) // self.n_heads, int(i) % self.n_heads) for i in order)


def check_scores(scores: ScoresInput, what: str) -> "HeadScores":
    """The same scores; raises for something else, which `what` needs."""
    if not isinstance(scores, HeadScores):
        expected = "HeadScores, such as `model.measure(samples, metric)` returns"
        raise HeadError(f"{what} needs {expected}; got {type(scores).__name__}.")
    return scores
