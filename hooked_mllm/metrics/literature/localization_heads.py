"""Localization heads: much attention on the image, all of it in one place."""

import numpy as np
import torch
from torch import Tensor

from hooked_mllm.errors import InputError
from hooked_mllm.heads import HeadScores
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.metrics.base import HeadMetric
from hooked_mllm.metrics.literature.grid import spatial_entropy, token_grid


def elbow(values: np.ndarray) -> float:
    """The value at the elbow of the sorted curve: the point farthest from the chord between its ends.

    Source: arXiv:2503.06287 (point of maximum curvature; the chord is its usual discrete form).

    Examples:
        >>> elbow(np.array([0.0, 0.01, 0.02, 0.03, 0.5, 1.0]))
        0.03
    """
    ordered = np.sort(values)
    span = ordered[-1] - ordered[0]
    if len(ordered) < 3 or not span > 0:
        return float(ordered[0])
    place = np.linspace(0.0, 1.0, len(ordered))
    return float(ordered[np.argmax(np.abs((ordered - ordered[0]) / span - place))])


class LocalizationHeads(HeadMetric):
    r"""Localization heads: how often a head is among those whose attention on the image is the least scattered.

    $$S^{l,h} = \sum_{j\in V} A^{l,h}[n,j],\qquad H^{l,h} = -\sum_i P(C_i)\log P(C_i),\qquad
    \text{score}[l,h] = \frac{1}{N}\sum_s \big[H_s^{l,h} \text{ among the } m \text{ lowest of the kept}\big]$$

    - $S$: attention of the prompt's last token on the image, averaged over samples. Kept are heads whose S is above
      the elbow of the sorted values, the first `skip_layers` layers excluded.
    - $H$: spatial entropy of that attention on the image's token grid; see `spatial_entropy`.
    - $m$: `lowest`; N: number of samples. Ties go to the lower layer, then head.

    In [0, 1]; heads that are not kept score 0. `image_mass()` and `kept()` give the first criterion.

    What the released code does differently: its first version returned the place of the elbow in the *order of heads*
    and kept all heads behind that place in the network, whatever their mass (later ones compare values, as here); it
    binarises the excess over the mean at 0.001, which depends on the resolution, divides by a total that includes
    what lies below, so that the P(C) need not sum to 1, flags heads that light the whole bottom row, takes the grid
    to be square, and leaves the exclusion of layers and the vote to the caller.

    Args:
        lowest: How many heads each sample elects.
        skip_layers: Number of first layers that take no part.
        queries: Name of the mask of query tokens; their mean row is taken.
        image: The number of the image whose grid is looked at.
        view: Which of its views; by default the one that shows the whole image at once.

    Returns (`compute()`):
        `HeadScores` [layer head].

    Raises:
        InputError: for a number of heads below 1, a model of no more than `skip_layers` layers, and on `update` for
            inputs without a layout.
        LayoutError: on `update`, if a sample has no such image or view.

    Source: arXiv:2503.06287.

    Examples:
        >>> from hooked_mllm.metrics import LocalizationHeads
        >>> LocalizationHeads(lowest=5).config()["lowest"]
        5
    """

    entropy: Tensor

    def __init__(
        self,
        *,
        lowest: int = 10,
        skip_layers: int = 2,
        queries: str = "last",
        image: int = 0,
        view: str | None = None,
    ) -> None:
        super().__init__()
        if lowest < 1 or skip_layers < 0:
            raise InputError(f"Expected lowest >= 1 and skip_layers >= 0; got {lowest!r} and {skip_layers!r}.")
        self.lowest = lowest
        self.skip_layers = skip_layers
        self.queries = queries
        self.image = image
        self.view = view
        self.add_rows("entropy")

    def score(self, view: AttentionView) -> Tensor:
        """The first criterion: attention on the image."""
        return view.mass(self.queries, "visual")

    def observe(self, view: AttentionView) -> dict[str, Tensor]:
        """The mass and the entropy of every head."""
        profile = view.profile(self.queries)
        entropy = torch.empty(profile.shape[:3], dtype=torch.float64)
        for number, layout in enumerate(view.context.layouts):
            grid = token_grid(layout, self.image, self.view)
            at = torch.from_numpy(grid.clip(min=0)).to(view.device)
            maps = profile[:, number][..., at].double().cpu().numpy() * (grid >= 0)
            for place in np.ndindex(*maps.shape[:2]):
                entropy[place[0], number, place[1]] = spatial_entropy(maps[place])
        return {**super().observe(view), "entropy": entropy}

    def image_mass(self) -> HeadScores:
        """The first criterion, averaged over samples, over all processes."""
        with self.synced():
            return self.scores("total", name=f"{type(self).__name__}.image_mass")

    def kept(self) -> Tensor:
        """True for the heads that pass the first criterion, [layer head]."""
        with self.synced():
            return self._kept()

    def compute(self) -> HeadScores:
        """The share of samples that elect each head.

        Raises:
            InputError: if no sample was taken in, or the model has too few layers.
            NumericsError: if a mass was NaN or infinite, naming the heads.
        """
        kept = self._kept()
        entropy = self.entropy.cpu().masked_fill(~kept, torch.inf).flatten(1)
        order = torch.sort(entropy, dim=1, stable=True)
        votes = torch.zeros_like(entropy)
        best = slice(0, min(self.lowest, int(kept.sum())))
        votes.scatter_(1, order.indices[:, best], order.values[:, best].isfinite().double())
        count = self.count.cpu()
        return HeadScores(
            votes.mean(0).view_as(kept),
            name=type(self).__name__,
            provenance={**self.provenance(), "n_samples": len(entropy), "n_kept": int(kept.sum())},
            counts=count,
            missing=(count == 0).nonzero().flatten().tolist(),
        )

    def _kept(self) -> Tensor:
        mass = self.scores("total")
        taken = mass.measured.clone()
        taken[: self.skip_layers] = False
        if not bool(taken.any()):
            raise InputError(
                f"{self!r} leaves out the first {self.skip_layers} layers; the model has {mass.n_layers}: no head left."
            )
        return taken & (mass.values > elbow(mass.values[taken].numpy()))
