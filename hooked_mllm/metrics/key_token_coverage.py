"""KeyTokenCoverage: the share of the target that a growing group of heads attends to."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooked_mllm.attention.row_statistics import coverage_by_rank, first_rank
from hooked_mllm.checks import checked
from hooked_mllm.display.blocks import html_block, html_table
from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.heads import HeadScores, HeadSet, HeadsLike, head_names, parse_heads
from hooked_mllm.heads.counting import Count, Share, resolve_count
from hooked_mllm.heads.parsing import Pairs
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.metrics.base import AttentionMetric, Piece, check_share
from hooked_mllm.storage import read_json, restoring, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is imported when something is drawn
    Figure = Any

KIND = "hooked_mllm.CoverageCurve"


@checked
@dataclass
class CoverageCurve:
    """Mean Key Token Coverage of the top k heads of a ranking, for every requested k.

    Args:
        ks: Numbers of heads.
        coverage: Mean coverage over the samples for each k, in [0, 1].
        n_samples: Number of samples.
        share: Share of the sequence that counts as most attended.
        provenance: Metric, settings, ranking and model.

    Examples:
        >>> CoverageCurve(ks=[1, 2], coverage=[0.25, 0.5], n_samples=4, share=0.05).at(2)
        0.5
    """

    ks: list[int]
    coverage: list[float]
    n_samples: int
    share: float
    provenance: dict[str, Any] = field(default_factory=dict)

    def at(self, k: int) -> float:
        """The coverage of the top `k` heads; raises a HeadError for a k that was not computed."""
        if k not in self.ks:
            raise HeadError(f"The coverage of the top {k} heads was not computed; it was for k in {self.ks}.")
        return self.coverage[self.ks.index(k)]

    def plot(self, *, title: str | None = None) -> Figure:
        """Draw the curve with `hooked_mllm.plots.coverage_curve`."""
        from hooked_mllm.plots import coverage_curve

        return coverage_curve(self) if title is None else coverage_curve(self, title=title)

    def save(self, path: str | Path) -> None:
        """Write the curve as JSON; raises a CacheFileError if that is not possible."""
        write_json(Path(path), KIND, vars(self))

    @classmethod
    def load(cls, path: str | Path) -> "CoverageCurve":
        """Read a file of `save`; raises a CacheFileError if it is missing, damaged, a pickle, or of another kind."""
        content = read_json(Path(path), KIND)
        names = set(cls.__dataclass_fields__)
        with restoring(path):
            if set(content) != names | {"kind"} or len(content["ks"]) != len(content["coverage"]):
                raise ValueError("its fields are not those of a coverage curve")
            return cls(**{name: content[name] for name in names})

    def _repr_html_(self) -> str:
        points = [(k, f"{coverage:.3f}") for k, coverage in zip(self.ks, self.coverage, strict=True)]
        title = f"CoverageCurve: {self.n_samples} samples, share {self.share:g}"
        return html_block(title, html_table(points, ("heads", "coverage"), align=">>"))


@checked
class KeyTokenCoverage(AttentionMetric):
    r"""Key Token Coverage (KTC): the share of the target tokens that any of the top k heads attends to, for every k.

    $$\mathrm{KTC}(G) = \frac{\big|\bigcup_{(l,h)\in G}(S^{l,h}\cap K^*)\big|}{|K^*|}$$

    - $G$: the first k heads of `ranking`.
    - $S^{l,h}$: the `ceil(share * N)` positions that head h of layer l attends to most, as in `KeyTokenRatio`.
    - $K^*$: the visual tokens of the target region; every sample needs one.

    In [0, 1], averaged over samples.

    Args:
        ranking: Head scores, or heads in the order of a ranking: a `HeadSet`, "L2H4, L3H1", pairs, a boolean mask
            `[layer head]`, or a list of these; not empty.
        ks: Numbers of heads (int), at most the length of the ranking, or shares of it (float); by default, 1 to that
            length.
        share: Share of the sequence that counts as most attended, above 0 and at most 1.
        queries: Name of the mask of query tokens.

    Source: arXiv:2606.05843 eq. 24 and 25, figure 6c.

    Examples:
        >>> from hooked_mllm import HeadSet
        >>> from hooked_mllm.metrics import KeyTokenCoverage
        >>> KeyTokenCoverage(HeadSet.parse("L1H0, L0H3", n_layers=2, n_heads=4)).ks
        [1, 2]
    """

    covered: Tensor
    count: Tensor

    def __init__(
        self,
        ranking: HeadScores | HeadsLike,
        *,
        ks: Sequence[Count] | None = None,
        share: Share = 0.05,
        queries: str = "question",
    ) -> None:
        super().__init__()
        scored = isinstance(ranking, HeadScores)
        self.ranking: HeadSet | Pairs = ranking.ranking if scored else parse_heads(ranking)
        n = len(self.ranking)
        if not n:
            raise HeadError("The ranking is empty: there is no head whose coverage could be measured.")
        self.ks = [*range(1, n + 1)] if ks is None else [resolve_count(k, n, "ranked heads") for k in ks]
        if not self.ks:
            raise HeadError(f"Expected one or more k from 0 to {n}, the length of the ranking; got none.")
        self.share, self.queries = check_share(share), queries
        self._ranks = torch.zeros(0, 0, dtype=torch.int32)  # [layer head], once the model is known
        # state [k]: the sum over samples of the coverage of the top k heads, k from 0
        self.add_state("covered", torch.zeros(n + 1, dtype=torch.float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum", persistent=True)

    def observe(self, view: AttentionView) -> dict[str, Tensor]:
        """The best rank among the heads of this view that hold each token."""
        if self._ranks.device != view.device:
            self._ranks = self._ranks.to(view.device)
        ranks = self._ranks[view.layer_index]
        best = first_rank(view.top(self.queries, self.share), ranks, len(self.ranking))
        return {"best": best, "target": view.mask("target")}

    def commit(self, pieces: Sequence[Piece]) -> None:
        """Add the curve of a sample, from all its layers."""
        # a token is covered by the top k heads if the best rank of a head that holds it is below k
        best = torch.stack([piece.parts["best"] for piece in pieces]).amin(0)
        curves = coverage_by_rank(best, pieces[0].parts["target"], len(self.ranking))
        self.covered = self.covered + curves.sum(0)
        self.count = self.count + curves.shape[0]

    def compute(self) -> CoverageCurve:
        """The mean curve over all samples; raises an InputError without samples."""
        if not int(self.count):
            raise InputError(f"{self!r} has seen no sample: there is nothing to compute.")
        curve = (self.covered / self.count).tolist()  # [k], from 0
        coverage = [curve[k] for k in self.ks]
        return CoverageCurve(list(self.ks), coverage, int(self.count), self.share, self.provenance())

    def config(self) -> dict[str, Any]:
        """The settings, the ranking as text."""
        return {**super().config(), "ranking": ", ".join(head_names(self.ranking))}

    def __repr__(self) -> str:
        return f"KeyTokenCoverage({self.ranking!r}, share={self.share!r}, queries={self.queries!r})"

    def _allocate(self, n_layers: int, n_heads: int) -> None:
        shape = (n_layers, n_heads)
        if tuple(self._ranks.shape) == shape:
            return
        heads = parse_heads(self.ranking, shape, whose="the model at hand")
        if int(self.count):
            raise HeadError(f"{self!r} has samples of another model: use a metric object of its own for every model.")
        self._ranks = torch.full(shape, len(heads), dtype=torch.int32)
        for rank, head in enumerate(heads):
            self._ranks[head] = rank
