"""HeadReference: z of heads over a set of samples, which mean and resample ablation read."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.display.blocks import html_block, html_table
from hooked_mllm.display.text import shortened
from hooked_mllm.errors import HeadError
from hooked_mllm.heads import HeadSet
from hooked_mllm.hooks import HookPoint


@checked
@dataclass(frozen=True, eq=False)
class HeadReference:
    """z of heads over a set of samples; `HeadAblation.reference` makes one.

    Attributes:
        mean: Mean z of each head over all tokens of all samples; NaN for other heads than `heads`.
        heads: The heads that it has.
        n_tokens: Number of tokens in the mean.
        n_samples: Number of samples in it.
        tower: "text" or "vision".
        positions: Positions of each sample that were averaged, as a record keeps them; None for all.
        ids: Names of the samples, where they have some.
        tokens: z of every token by layer, `[token head d_head]` with heads in ascending order; empty unless kept.
    """

    mean: Float[Tensor, "layer head d_head"]
    heads: HeadSet
    n_tokens: int
    n_samples: int
    tower: str = "text"
    positions: Any = None
    ids: tuple[str | None, ...] = ()
    tokens: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def check(self, heads: HeadSet, tower: str) -> None:
        """Raise for heads to ablate that it does not have, or those of another tower."""
        if self.tower != tower:
            raise HeadError(f"This reference is of the {self.tower} tower, the ablation of the {tower} tower.")
        missing = heads - self.heads
        if missing:
            how = "HeadAblation.reference(model, samples, heads)"
            raise HeadError(f"The reference has no {missing}: make it with {how} for all heads that are ablated.")

    def describe(self) -> dict[str, Any]:
        """Its origin, as values that JSON can hold."""
        named = [i for i in self.ids if i is not None]
        facts = {"samples": self.n_samples, "tokens": self.n_tokens, "positions": self.positions}
        return {**facts, "ids": named} if named else facts

    def _repr_html_(self) -> str:
        facts = {"tower": self.tower, "heads": str(self.heads), **self.describe(), "tokens kept": bool(self.tokens)}
        cells = [(name, shortened(str(value), 1000)) for name, value in facts.items()]
        return html_block(f"HeadReference: {len(self.heads)} heads", html_table(cells, named=True))


@dataclass
class HeadSums:
    """A hook that sums z of heads over tokens, in float64."""

    by_layer: dict[int, tuple[int, ...]]
    keep: bool
    mask: Tensor | None = None  # positions of the present samples that are summed `[batch pos]`; None for all
    sums: dict[int, Tensor] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)
    kept: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def __call__(self, z: Tensor, hook: HookPoint) -> None:
        """Add z `[batch pos head d_head]` of one layer."""
        layer = hook.layer()
        z = z.detach()[:, :, list(self.by_layer[layer])]
        # [batch pos head d_head] -> [token head d_head]
        tokens = z.flatten(0, 1) if self.mask is None else z[self.mask.to(z.device)]
        self.sums[layer] = self.sums.get(layer, 0) + tokens.double().sum(0).cpu()
        self.counts[layer] += len(tokens)
        if self.keep:
            self.kept[layer].append(tokens.cpu())
