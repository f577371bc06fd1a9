"""A fixed set of dense heads, as a policy."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.errors import HeadError
from hooked_mllm.heads import HeadSet


class StaticHeads:
    """The same dense heads for every prompt: what `HybridAttention` does with a `HeadSet`, beside which others stand.

    Args:
        heads: The dense heads.

    Raises:
        HeadError: for something else than a `HeadSet`.

    Source: arXiv:2606.05843, algorithm 3.

    Examples:
        >>> from hooked_mllm import HeadSet
        >>> StaticHeads(HeadSet(["L2H4", "L2H5"], n_layers=6, n_heads=8)).describe()
        {'policy': 'StaticHeads', 'heads': ['L2H4', 'L2H5']}
    """

    def __init__(self, heads: Any) -> None:
        if not isinstance(heads, HeadSet):
            raise HeadError(f"StaticHeads takes a HeadSet, such as `scores.top(20)`; got {type(heads).__name__}.")
        self.heads: HeadSet = heads
        self._by_layer = heads.by_layer

    def choose(
        self,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch kv_head key d_head"],
        mask: MaskRows,
        scale: float,
        layer: int,
    ) -> tuple[int, ...]:
        """The dense query heads of this layer."""
        return self._by_layer.get(layer, ())

    def validate(self, n_layers: int, n_heads: int) -> None:
        """Refuse a model of another shape.

        Raises:
            HeadError: for such.
        """
        if self.heads.shape != (n_layers, n_heads):
            raise HeadError(
                f"These heads are of a model of {self.heads.n_layers} layers x {self.heads.n_heads} heads; this one "
                f"has {n_layers} x {n_heads}. Rank the heads of this model."
            )

    def describe(self) -> dict[str, Any]:
        """What it is, as values that JSON can hold."""
        return {"policy": "StaticHeads", "heads": [f"L{layer}H{head}" for layer, head in self.heads]}

    def __repr__(self) -> str:
        return f"StaticHeads({self.heads!r})"
