"""Localization heads: heads whose attention on the image is high and in one region."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.attention.row_statistics import top_mask
from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.heads import HeadScores
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.metrics.base import HeadMetric
from hooked_mllm.metrics.literature.grid import spatial_entropy, token_grid

#: sums and entropies of float32 attention that differ by less are equal
ROUNDING = 1e-5


def elbow(values: np.ndarray) -> float:
    """The value of the sorted curve farthest from the chord between its ends (arXiv:2503.06287: maximum curvature)."""
    ordered = np.sort(values)
    span = ordered[-1] - ordered[0]
    if len(ordered) < 3 or not span > 0:
        return float(ordered[0])
    chord = np.linspace(0.0, 1.0, len(ordered))
    distance = np.abs((ordered - ordered[0]) / span - chord)
    return float(ordered[np.argmax(distance >= distance.max() - ROUNDING)])  # the lowest of equally far values


@checked
class LocalizationHeads(HeadMetric):
    r"""Localization heads: how often a head's attention on the image is among the least scattered.

    $$S^{l,h} = \sum_{j\in V} A^{l,h}[n,j],\qquad H^{l,h} = -\sum_i P(C_i)\log P(C_i),\qquad
    \text{score}[l,h] = \frac{1}{N}\sum_s \big[H_s^{l,h} \text{ among the } m \text{ lowest of the kept}\big]$$

    - $S$: attention of the prompt's last token on the image, averaged over samples. Kept are heads whose S is above
      the elbow of the sorted values, the first `skip_layers` layers excluded; the others score 0.
    - $H$: spatial entropy of that attention on the image's token grid; see `spatial_entropy`.
    - $m$: `lowest`; N: number of samples. Ties go to the lower layer, then head; so do entropies, and values at the
      elbow, that differ by less than 1e-5, the rounding of float32.

    The released code differs: its first version returned the index of the elbow in the *order of heads* and kept all
    later heads of the network, whatever their mass (later versions compare values, as here); it binarises the excess
    over the mean at 0.001, which depends on the resolution, divides by a total that includes what is below, so that
    the P(C) need not sum to 1, flags heads that attend to the whole bottom row, assumes a square grid, and leaves the
    exclusion of layers and the vote to the caller.

    Args:
        lowest: m, at least 1.
        skip_layers: Number of first layers without scores; fewer than the model has.
        queries: Name of the mask of query tokens, whose mean row is used.
        image: The number of the image; every sample needs it.
        view: One of its views; by default that of the whole image.

    Source: arXiv:2503.06287.

    Examples:
        >>> from hooked_mllm.metrics import LocalizationHeads
        >>> LocalizationHeads(lowest=5)
        LocalizationHeads(lowest=5, skip_layers=2, queries='last', image=0, view=None)
    """

    entropy: Tensor

    def __init__(
        self, *, lowest: int = 10, skip_layers: int = 2, queries: str = "last", image: int = 0, view: str | None = None
    ) -> None:
        super().__init__()
        if lowest < 1 or skip_layers < 0:
            raise InputError(f"Expected lowest >= 1 and skip_layers >= 0; got {lowest!r} and {skip_layers!r}.")
        self.lowest, self.skip_layers = lowest, skip_layers
        self.queries, self.image, self.view = queries, image, view
        self.add_rows("entropy")

    def score(self, view: AttentionView) -> Float[Tensor, "layer batch head"]:
        """S of each sample."""
        return view.mass(self.queries, "visual")

    def observe(self, view: AttentionView) -> dict[str, Tensor]:
        """S and H of every head."""
        profile = view.profile(self.queries)
        entropy = torch.empty(profile.shape[:3], dtype=torch.float64)
        for number, layout in enumerate(view.context.layouts):
            grid = token_grid(layout, self.image, self.view)
            positions = torch.from_numpy(grid.clip(min=0)).to(view.device)
            maps = profile[:, number][..., positions].double().cpu().numpy() * (grid >= 0)  # [layer head row column]
            for layer, head in np.ndindex(*maps.shape[:2]):
                entropy[layer, number, head] = spatial_entropy(maps[layer, head])
        return {**super().observe(view), "entropy": entropy}

    def image_mass(self) -> HeadScores:
        """S, averaged over the samples of all processes."""
        with self.synced():
            return self.scores("total", name=f"{type(self).__name__}.image_mass")

    def kept(self) -> Tensor:
        """True for the kept heads, [layer head]."""
        with self.synced():
            return self._kept()

    def compute(self) -> HeadScores:
        """The share of samples that select each head."""
        kept = self._kept()
        entropy = self.entropy.cpu().masked_fill(~kept, torch.inf).flatten(1)
        # entropy is 0 or more: 1 is added so that a relative rounding is an absolute one where it is small
        votes = top_mask(-1 - entropy, min(self.lowest, entropy.shape[1]), rounding=ROUNDING) & entropy.isfinite()
        scores = votes.double().mean(0).view_as(kept)  # [layer * head] -> [layer head]
        return self._head_scores(scores, type(self).__name__, {"n_kept": int(kept.sum())})

    def _kept(self) -> Tensor:
        mass = self.scores("total")
        compared = mass.measured.clone()
        compared[: self.skip_layers] = False
        if not bool(compared.any()):
            raise InputError(
                f"{self!r} leaves out the first {self.skip_layers} layers; the model has {mass.n_layers}: no head left."
            )
        values = mass.values[compared].numpy()
        return compared & (mass.values > elbow(values) + ROUNDING * float(np.ptp(values)))
