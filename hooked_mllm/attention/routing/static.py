"""Dense heads that are the same for every prompt."""

from typing import Any

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.checks import checked
from hooked_mllm.heads import HeadsLike, head_names, parse_heads
from hooked_mllm.heads.head_set import heads_by_layer
from hooked_mllm.kernels.implementations import Keys, Queries


class FixedHeads:
    """Dense heads that do not depend on the prompt, of a model of known or unknown shape; may be empty."""

    def __init__(self, heads: HeadsLike) -> None:
        self.heads = parse_heads(heads)
        self.by_layer = heads_by_layer(self.heads)

    def choose(self, q: Queries, k: Keys, mask: MaskRows, scale: float, layer: int) -> tuple[int, ...]:
        """The dense query heads of this layer."""
        return self.by_layer.get(layer, ())

    def validate(self, n_layers: int, n_heads: int) -> None:
        """Check that a model of this shape has the heads, or raise a `HeadError`."""
        hint = "Rank the heads of this model (of key-value heads, take `scores.to_query(n_heads)`)"
        parse_heads(self.heads, (n_layers, n_heads), hint=f"{hint}, or use attention='sdpa'.")

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        return {"policy": type(self).__name__, "heads": head_names(self.heads)}

    def __len__(self) -> int:
        return len(self.heads)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.heads!r})"


class StaticHeads(FixedHeads):
    """The same dense heads for every prompt, as a policy.

    Args:
        heads: The dense heads: "L2H4", a pair, a `HeadSet`, a boolean mask `[layer head]`, or a list of these.

    Raises:
        HeadError: For other values; when a model runs, for heads that it lacks.

    Source: arXiv:2606.05843, algorithm 3.

    Examples:
        >>> from hooked_mllm import HeadSet
        >>> StaticHeads(HeadSet(["L2H4", "L2H5"], n_layers=6, n_heads=8)).describe()
        {'policy': 'StaticHeads', 'heads': ['L2H4', 'L2H5']}
    """

    @checked
    def __init__(self, heads: HeadsLike) -> None:
        super().__init__(heads)
