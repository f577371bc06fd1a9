"""HeadScores: one number per attention head, with where it came from."""

import random as random_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mllm.errors import HeadError, NumericsError
from hooked_mllm.heads.arithmetic import Arithmetic
from hooked_mllm.heads.counting import resolve_count
from hooked_mllm.heads.grouping import Grouping
from hooked_mllm.heads.head_set import HeadSet, check_head, parse_head
from hooked_mllm.heads.summaries import rho_half
from hooked_mllm.storage import read_json, read_tensors, write_json, write_tensors

KIND = "hooked_mllm.HeadScores"


class HeadScores(Arithmetic, Grouping):
    """One float64 per query head of a model, ranked, compared, combined and saved.

    Arithmetic (`+ - * /` with scores or numbers, unary minus) works head by head and records its expression.

    Args:
        values: Scores of shape [layer head]; kept as float64 on the CPU.
        name: What the numbers are, such as "RetrievalAttentionMass".
        provenance: JSON-able facts: model, revision, metric and its settings, dataset, sample ids, template, seed,
            versions.
        counts: Number of samples behind each score, [layer head] or [layer].
        missing: Layers that were not measured. Their values become NaN and they take no part in rankings; anywhere
            else a NaN or an infinity is refused.

    Raises:
        HeadError: for values or counts of another shape, or a missing layer that is out of range.
        NumericsError: for a value that is not finite in a layer that is not declared missing.

    Examples:
        >>> scores = HeadScores([[0.1, 0.4], [0.3, 0.2]], name="demo")
        >>> scores.top(2)
        HeadSet(2 of 2 x 2: L0H1, L1H0)
        >>> scores["L1H0"]
        0.3
    """

    values: Tensor
    counts: Tensor | None

    def __init__(
        self,
        values: Any,
        *,
        name: str = "scores",
        provenance: Mapping[str, Any] | None = None,
        counts: Any = None,
        missing: Sequence[int] = (),
    ) -> None:
        if not isinstance(values, Tensor):
            values = torch.from_numpy(np.array(values, dtype=np.float64))  # torch would read a list as float32
        self.values = values.detach().to(device="cpu", dtype=torch.float64, copy=True)
        if self.values.dim() != 2 or 0 in self.values.shape:
            raise HeadError(f"Expected values of shape [layer head]; got shape {list(self.values.shape)}.")
        self.name = name
        self.provenance = dict(provenance or {})
        self.missing = tuple(sorted({int(layer) for layer in missing}))
        for layer in self.missing:
            if not 0 <= layer < self.n_layers:
                raise HeadError(f"Missing layer {layer} is out of range: layers are 0 to {self.n_layers - 1}.")
        if len(self.missing) == self.n_layers:
            raise HeadError("Every layer is declared missing: there are no scores.")
        self.values[list(self.missing)] = torch.nan
        self._refuse_non_finite()
        self.counts = self._checked_counts(counts)

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return self.values.shape[0]

    @property
    def n_heads(self) -> int:
        """Number of query heads per layer."""
        return self.values.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads)."""
        return self.n_layers, self.n_heads

    @property
    def measured(self) -> Bool[Tensor, "layer head"]:
        """True for the heads that have a score."""
        return ~self.values.isnan()

    @property
    def ranking(self) -> HeadSet:
        """All measured heads from the highest score to the lowest; ties in order of layer, then head."""
        return self._ordered(descending=True)

    def top(self, k: int | float) -> HeadSet:
        """The `k` highest heads (int), or the share `k` of them rounded up (float); ties to the lower layer, then head.

        Raises:
            HeadError: if there are not that many.
        """
        return self.ranking[: self._count(k)]

    def bottom(self, k: int | float) -> HeadSet:
        """The `k` lowest heads, lowest first; ties to the lower layer, then head.

        Raises:
            HeadError: if there are not that many.
        """
        return self._ordered(descending=False)[: self._count(k)]

    def random(
        self,
        k: int | float | None = None,
        seed: int = 0,
        *,
        like: HeadSet | None = None,
        exclude: HeadSet | None = None,
    ) -> HeadSet:
        """A control group of heads drawn at random, the same for the same seed on every machine.

        Args:
            k: How many (int) or which share (float). With `like` it may be left out.
            seed: Seed of the draw.
            like: Draw as many heads in each layer as this set has there, and none of its own heads.
            exclude: Heads that must not be drawn; those of `like` by default.

        Raises:
            HeadError: if neither `k` nor `like` is given, if they disagree, or if too few heads are left.
        """
        if k is None and like is None:
            raise HeadError("random() needs a number of heads, or `like=` a set of heads to copy the layers of.")
        exclude = like if exclude is None else exclude
        for heads in (like, exclude):
            if heads is not None and heads.shape != self.shape:
                raise HeadError(f"The scores are {self._size()} (layers x heads), the given heads {heads.shape}.")
        draw = random_module.Random(seed)
        order = sorted(sorted(self.ranking), key=lambda _: draw.random())
        left = [head for head in order if exclude is None or head not in exclude]
        if like is None:
            n = self._count(k)
            if len(left) < n:
                raise HeadError(f"{n} random heads were asked for, but only {len(left)} are left to draw from.")
            return self._set(left[:n])
        if k is not None and self._count(k) != len(like):
            raise HeadError(f"k={k} disagrees with `like`, which holds {len(like)} heads; leave k out.")
        drawn: list[tuple[int, int]] = []
        for layer, heads in like.by_layer.items():
            candidates = [head for head in left if head[0] == layer]
            if len(candidates) < len(heads):
                raise HeadError(
                    f"Layer {layer}: `like` has {len(heads)} heads there, but only {len(candidates)} of {self.n_heads} "
                    "are left after the excluded ones. Rank fewer heads, or pass `exclude=` an empty set."
                )
            drawn += candidates[: len(heads)]
        return self._set(drawn)

    def spearman(self, other: "HeadScores") -> float:
        """Spearman rank correlation over the heads that both measured (ties share their mean rank).

        Raises:
            HeadError: if the shapes differ or fewer than two heads are measured in both.
            NumericsError: if all the scores of one are equal, so that no correlation is defined.
        """
        from scipy.stats import spearmanr

        self._same_shape(other)
        both = self.measured & other.measured
        if both.sum() < 2:
            raise HeadError(f"{self.name} and {other.name} have fewer than two measured heads in common.")
        mine, theirs = self.values[both], other.values[both]
        for scores, values in ((self, mine), (other, theirs)):
            if bool((values == values[0]).all()):
                raise NumericsError(f"All scores of {scores.name} are equal: a rank correlation is not defined.")
        result: Any = spearmanr(mine.numpy(), theirs.numpy())
        return float(result.statistic)

    def overlap(self, other: "HeadScores", k: int | float) -> float:
        """The share of the top `k` heads that is also in the other's top `k`, from 0 to 1.

        Raises:
            HeadError: if the shapes differ, or for k of no heads or too many.
        """
        self._same_shape(other)
        mine, theirs = self.top(k), other.top(k)
        if not mine:
            raise HeadError(f"The overlap of the top {k} heads is not defined: expected at least one head.")
        return len(mine & theirs) / len(mine)

    def percentile_mask(self, percentile: int | float = 95.0) -> Bool[Tensor, "layer head"]:
        """True where the score reaches the given percentile (0 to 100) of all scores, by linear interpolation.

        Source: arXiv:2606.05843 eq. 20.
        """
        threshold = float(np.percentile(self.values[self.measured].numpy(), percentile))
        return self.values >= threshold

    def mean(self, heads: HeadSet | None = None) -> float:
        """The mean score over a group of heads; over all measured heads if none is given.

        Raises:
            HeadError: for an empty group, one of another shape, or one with a head that was not measured.
        """
        if heads is None:
            return float(self.values[self.measured].mean())
        if not heads:
            raise HeadError("The mean over an empty set of heads is not defined.")
        return sum(self[head] for head in heads) / len(heads)

    def rho_half(self) -> float:
        """The least share of the heads that together hold half of all positive score; see `heads.rho_half`."""
        return rho_half(self)

    def table(self, k: int = 10) -> str:
        """The top `k` heads (all, if there are fewer) as text, one line each: rank, head, score."""
        heads = self.ranking[:k]
        rows = [f"{'rank':>4}  {'head':<8}  {self.name}"]
        for rank, head in enumerate(heads, start=1):
            rows.append(f"{rank:>4}  {'L{}H{}'.format(*head):<8}  {self[head]:.6g}")
        return "\n".join(rows)

    def plot(self, **options: Any) -> Any:
        """Draw the layer x head map with `hooked_mllm.plots.head_map`; returns a matplotlib Figure."""
        from hooked_mllm.plots import head_map

        return head_map(self, **options)

    def save(self, path: str | Path) -> None:
        """Write `<path>.json` and `<path>.safetensors`; each holds everything. A suffix of `path` is replaced."""
        stem = _stem(path)
        header = {"name": self.name, "missing": list(self.missing), "provenance": self.provenance}
        rows = [[None if np.isnan(value) else value for value in row] for row in self.values.tolist()]
        counts = None if self.counts is None else self.counts.tolist()
        tensors = {"values": self.values} | ({} if self.counts is None else {"counts": self.counts})
        write_json(stem.with_name(stem.name + ".json"), KIND, {**header, "values": rows, "counts": counts})
        write_tensors(stem.with_name(stem.name + ".safetensors"), KIND, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "HeadScores":
        """Read scores from a `.json` or a `.safetensors` file (the latter, if `path` has no such suffix).

        Raises:
            CacheFileError: if the file is missing, damaged, a pickle, or holds something else.
        """
        path = Path(path)
        if path.suffix == ".json":
            header = read_json(path, KIND)
            tensors = {name: header[name] for name in ("values", "counts") if header.get(name) is not None}
            values = [[np.nan if value is None else value for value in row] for row in tensors.get("values", [])]
            tensors["values"] = values
        else:
            path = path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")
            tensors, header = read_tensors(path, KIND)
        return _restore(cls, path, tensors, header)

    def __getitem__(self, head: Any) -> Any:
        """`scores[20, 15]` or `scores["L20H15"]`: the score of one head; `scores[20]`: the scores of a layer."""
        if isinstance(head, int):
            layer, _ = check_head((head, 0), self.n_layers, self.n_heads)
            return self.values[layer].clone()
        layer, index = check_head(parse_head(head) if isinstance(head, str) else head, self.n_layers, self.n_heads)
        if layer in self.missing:
            raise HeadError(f"Layer {layer} was not measured; missing layers: {list(self.missing)}.")
        return float(self.values[layer, index])

    def __eq__(self, other: object) -> bool:
        """Same name, values, counts and missing layers. The provenance is not compared."""
        if not isinstance(other, HeadScores):
            return NotImplemented
        same_counts = (self.counts is None) == (other.counts is None)
        if self.counts is not None and other.counts is not None:
            same_counts = torch.equal(self.counts, other.counts)
        return (
            self.name == other.name
            and self.missing == other.missing
            and same_counts
            and self.shape == other.shape
            and torch.equal(self.values.nan_to_num(), other.values.nan_to_num())
        )

    __hash__ = None  # type: ignore[assignment]  # provenance may be added to

    def __repr__(self) -> str:
        heads = self.ranking[:3]
        best = ", ".join(f"L{layer}H{head} {self[layer, head]:.3g}" for layer, head in heads)
        missing = f", missing layers {list(self.missing)}" if self.missing else ""
        return f"HeadScores({self.name}, {self._size()} layers x heads{missing}, top: {best})"

    def _size(self) -> str:
        return f"{self.n_layers} x {self.n_heads}"

    def _count(self, k: int | float | None) -> int:
        return resolve_count(0 if k is None else k, int(self.measured.sum()), "measured heads")

    def _set(self, heads: Any) -> HeadSet:
        return HeadSet(heads, n_layers=self.n_layers, n_heads=self.n_heads)

    def _ordered(self, *, descending: bool) -> HeadSet:
        flat = self.values.flatten()
        order = torch.sort(flat, descending=descending, stable=True).indices
        order = order[~flat[order].isnan()]
        return self._set((int(i) // self.n_heads, int(i) % self.n_heads) for i in order)

    def _same_shape(self, other: "HeadScores") -> None:
        if self.shape != other.shape:
            raise HeadError(
                f"{self.name} is {self._size()} and {other.name} {other._size()} (layers x heads): "
                "scores of models of different shape cannot be compared head by head."
            )

    def _refuse_non_finite(self) -> None:
        measured = torch.ones(self.n_layers, dtype=torch.bool)
        measured[list(self.missing)] = False
        bad = ~self.values.isfinite() & measured[:, None]
        if bool(bad.any()):
            heads = HeadSet.from_mask(bad)
            raise NumericsError(
                f"{self.name}: {len(heads)} scores are not finite, first at {heads[:4]}. Expected finite numbers; "
                "declare layers that were not measured with `missing=`."
            )

    def _checked_counts(self, counts: Any) -> Tensor | None:
        if counts is None:
            return None
        tensor = torch.as_tensor(counts).to(device="cpu", dtype=torch.int64)
        if tensor.dim() == 1 and tensor.shape[0] == self.n_layers:
            tensor = tensor[:, None].expand(self.shape)
        if tuple(tensor.shape) != self.shape:
            raise HeadError(
                f"Expected counts of shape {list(self.shape)} or [{self.n_layers}]; got {list(tensor.shape)}."
            )
        return tensor.clone()


def _stem(path: str | Path) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".json", ".safetensors") else path


def _restore(cls: type[HeadScores], path: Path, tensors: Mapping[str, Any], header: Mapping[str, Any]) -> HeadScores:
    from hooked_mllm.errors import CacheFileError

    def refuse(error: object) -> NoReturn:
        raise CacheFileError(f"{path} is damaged: {error}") from None

    try:
        return cls(
            tensors["values"],
            counts=tensors.get("counts"),
            name=header["name"],
            provenance=header["provenance"],
            missing=header["missing"],
        )
    except (KeyError, TypeError, ValueError, HeadError, NumericsError) as error:
        refuse(error)
