"""Between query heads and the key-value heads that they share: head h reads key-value head h // (H / H_kv)."""

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from hooked_mllm.errors import HeadError
from hooked_mllm.heads.head_values import HeadValues, Scores

if TYPE_CHECKING:
    Reduction = Literal["sum", "mean", "max"]
else:  # at run time wider, so that another value reaches the check whose error lists the choices
    Reduction = str

REDUCTIONS: tuple[Reduction, ...] = ("sum", "mean", "max")


class Grouping(HeadValues):
    """`to_query` and `to_kv` of head scores."""

    def to_query(self: Scores, n_heads: int) -> Scores:
        """Scores of key-value heads as scores of query heads: each query head has that of the one it reads.

        Args:
            n_heads: Query heads per layer, `model.cfg.n_heads`.

        Raises:
            HeadError: If it is no multiple of the number of key-value heads.

        Examples:
            >>> from hooked_mllm import HeadScores
            >>> HeadScores([[0.2, 0.9]]).to_query(4).values.tolist()
            [[0.2, 0.2, 0.9, 0.9]]
        """
        groups = _groups(n_heads, self.values.shape[1])
        counts = None if self.counts is None else self.counts.repeat_interleave(groups, dim=1)
        values = self.values.repeat_interleave(groups, dim=1)  # [layer kv_head] -> [layer kv_head * group]
        return _regrouped(self, values, counts, {"heads": "query", "repeated": groups})

    def to_kv(self: Scores, n_kv_heads: int, reduce: Reduction) -> Scores:
        """Scores of query heads as scores of the key-value heads that they read.

        Args:
            n_kv_heads: Key-value heads per layer, `model.cfg.n_key_value_heads`.
            reduce: "sum", "mean" or "max" over each group.

        Raises:
            HeadError: If the number of query heads is no multiple of `n_kv_heads`, or for another reduction.

        Examples:
            >>> from hooked_mllm import HeadScores
            >>> HeadScores([[0.25, 0.5, 1.0, 0.0]]).to_kv(2, reduce="max").values.tolist()
            [[0.5, 1.0]]
        """
        if reduce not in REDUCTIONS:
            raise HeadError(f"reduce must be one of {', '.join(map(repr, REDUCTIONS))}; got {reduce!r}.")
        _groups(self.values.shape[1], n_kv_heads)
        grouped = self.values.unflatten(1, (n_kv_heads, -1))  # [layer head] -> [layer kv_head group]
        values = grouped.amax(-1) if reduce == "max" else getattr(grouped, reduce)(-1)
        counts = None if self.counts is None else self.counts.unflatten(1, (n_kv_heads, -1)).amin(-1)
        return _regrouped(self, values, counts, {"heads": "key-value", "reduced": reduce})


def _regrouped(scores: Scores, values: Tensor, counts: Tensor | None, facts: dict[str, Any]) -> Scores:
    provenance = {**scores.provenance, **facts}
    if facts.get("reduced") == "sum" and "chance" in provenance:
        group = scores.n_heads // values.shape[1]
        provenance["chance"] = [None if c is None else c * group for c in provenance["chance"]]
    if provenance.pop("chance_by_head", None) and facts.get("reduced") == "max":
        del provenance["chance"]  # the mean over a layer's heads, whose maximum in each group is another
    return type(scores)(values, name=scores.name, provenance=provenance, counts=counts, missing=scores.missing)


def _groups(n_heads: int, n_kv_heads: int) -> int:
    if n_kv_heads < 1 or n_heads < n_kv_heads or n_heads % n_kv_heads:
        raise HeadError(f"{n_heads} query heads cannot share {n_kv_heads} key-value heads evenly.")
    return n_heads // n_kv_heads
