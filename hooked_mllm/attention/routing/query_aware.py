"""Dense heads chosen from the prompt itself: those that would lose most by streaming."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.routing.budget import Budget, PerLayer
from hooked_mllm.attention.routing.lost_attention import check_estimate, lost_attention
from hooked_mllm.checks import checked
from hooked_mllm.errors import HeadError, InputError, NumericsError, UnsupportedModelError
from hooked_mllm.heads import HeadScores
from hooked_mllm.kernels.implementations import Keys, Queries
from hooked_mllm.kernels.streaming_window import WholeNumber, check_sink_and_window


@checked
@dataclass(frozen=True)
class LayerChoice:
    """The estimate and the choice of a policy in one layer of the last prompt.

    Args:
        lost: The estimate of each query head, mean over the batch; empty if the budget had no room.
        scores: The ranking of the heads: `lost`, times the prior if there is one.
        heads: The dense heads, in ascending order.
    """

    lost: tuple[float, ...]
    scores: tuple[float, ...]
    heads: tuple[int, ...]


class QueryAwareHeads:
    r"""In every layer of every prompt, the heads whose last queries would lose most by streaming become dense.

    $$D_l = \{h : \pi_{lh} \lambda_{lh} > \tau\},\ \text{the largest of them, up to the budget}$$

    with the lost attention of `lost_attention` and a prior pi (1 without one). A head that loses nothing stays
    streaming. Ties go to the lower head. A batch has one set of dense heads, by the mean over its samples.

    The cost of a layer is the estimate (see `lost_attention`) and one wait for the device (two with padding). A budget
    over all layers needs forward passes that begin at layer 0.

    Args:
        budget: `PerLayer` or `Total`.
        queries: The queries of the estimate: a number of last tokens, or a mask `[batch pos]`, such as that of the
            question, for one prompt.
        order: 1 ranks by the lost mass, 2 by its length, in which spread-out attention counts little.
        keys: "exact", or an estimate from blocks: "mean", "bound" or "sample".
        block: Keys in a block.
        threshold: tau, 0 or more.
        prior: Static scores of all heads, not negative, such as those of RAM.
        sink: The sink of streaming heads; set by `HybridAttention`.
        window: Their window; set by `HybridAttention`.

    Raises:
        InputError: For settings out of range, or a prior with a negative or missing score.

    Source: input-adaptive routing is named as future work in arXiv:2606.05843; estimating from the last queries:
    arXiv:2407.02490, arXiv:2502.20766.

    Examples:
        >>> from hooked_mllm import HookedMLLM, HybridAttention, toys
        >>> from hooked_mllm.attention.routing import Total
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=4).samples(model, 1)[0]
        >>> policy = QueryAwareHeads(Total(6), queries=8, order=2)
        >>> with model.attention(HybridAttention(policy, sink=4, window=16, implementation="naive")):
        ...     logits = model(sample)
        >>> sum(map(len, policy.chosen.values()))
        6
    """

    @checked
    def __init__(
        self, budget: Any, *, queries: int | Bool[Tensor, "batch pos"] = 64, order: int = 1, keys: str = "exact",
        block: int = 64, threshold: float = 0.0, prior: HeadScores | None = None,
        sink: WholeNumber | None = None, window: WholeNumber | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(budget, Budget):
            raise InputError(f"Expected a budget, PerLayer(heads) or Total(heads); got {budget!r}.")
        if isinstance(queries, bool) or (isinstance(queries, int) and queries < 1):
            raise InputError(f"Expected a number of last tokens, 1 or more, or a mask [batch pos]; got {queries!r}.")
        if not threshold >= 0:
            raise InputError(f"Expected a threshold of 0 or more; got {threshold!r}.")
        check_estimate(order, keys, block)
        if prior is not None and not isinstance(prior, HeadScores):
            raise InputError(f"Expected a prior of HeadScores (`HeadScores.load(path)` reads a file); got {prior!r}.")
        if prior is not None and (prior.missing or bool((prior.values < 0).any())):
            raise InputError(
                f"The prior {prior.name} has negative or missing scores, which no lost attention can be weighed by: "
                "give scores from 0 up for every layer, such as those of RetrievalAttentionMass."
            )
        self.budget: Budget = budget
        self.order, self.keys, self.block = order, keys, block
        self.queries = queries if isinstance(queries, int) else queries.bool().cpu()
        self.threshold, self.prior = float(threshold), prior
        sizes = check_sink_and_window(0 if sink is None else sink, 1 if window is None else window)
        self.sink, self.window = None if sink is None else sizes[0], None if window is None else sizes[1]
        #: the last prompt, by layer
        self.record: dict[int, LayerChoice] = {}
        self._n_layers: int | None = None if prior is None else prior.n_layers

    @property
    def chosen(self) -> dict[int, tuple[int, ...]]:
        """The dense heads of the last prompt by layer, layers without any left out."""
        return {layer: choice.heads for layer, choice in sorted(self.record.items()) if choice.heads}

    def set_streaming(self, sink: int, window: int) -> None:
        """Set the sink and the window of the attention; others than those of `__init__` raise an `InputError`."""
        for name, own, size in (("sink", self.sink, sink), ("window", self.window, window)):
            if own not in (None, size):
                raise InputError(f"This policy estimates what is lost with {name}={own}, the attention has {size}.")
        self.sink, self.window = sink, window

    def choose(self, q: Queries, k: Keys, mask: MaskRows, scale: float, layer: int) -> tuple[int, ...]:
        """The dense query heads of this layer for this prompt.

        Raises:
            InputError: Without a sink and a window, or for a mask of queries of another prompt.
            NumericsError: If the estimate is not finite.
            UnsupportedModelError: For a mask that is not causal; in a recomputing backward pass with a total budget.
        """
        if self.sink is None or self.window is None:
            raise InputError("Give the policy sink= and window=, or use it in HybridAttention, which sets them.")
        again = torch._C._current_graph_task_id() != -1  # torch has no public function for "within a backward pass"
        if again and not isinstance(self.budget, PerLayer):
            raise UnsupportedModelError(
                "A backward pass runs attention again (gradient checkpointing, compiled code), and what layers took of "
                f"{self.budget} when this prompt was read is not known any more. Take a budget PerLayer, or the heads "
                "that were chosen: HybridAttention(policy.chosen)."
            )
        if not again:
            self.record = {at: choice for at, choice in self.record.items() if at < layer}
        if self._n_layers is None:
            raise InputError("The policy has not been validated for a model: call validate(n_layers, n_heads).")
        if layer >= self._n_layers:
            raise HeadError(f"Layer {layer} is not there: the policy is for layers 0 to {self._n_layers - 1}.")
        taken = {at: len(choice.heads) for at, choice in self.record.items()}
        room = self.budget.room(layer, taken, self._n_layers)
        choice = self._choice(q, k, mask, scale, layer, room) if room else LayerChoice((), (), ())
        if not again:
            self.record[layer] = choice
        return choice.heads

    def _choice(self, q: Queries, k: Keys, mask: MaskRows, scale: float, layer: int, room: int) -> LayerChoice:
        sizes = {"sink": self.sink, "window": self.window, "order": self.order, "keys": self.keys, "block": self.block}
        estimate = lost_attention(q, k, mask, scale, queries=self.queries, **sizes)
        lost = estimate.mean(0, dtype=torch.float64).cpu()
        if not bool(lost.isfinite().all()):
            raise NumericsError(
                f"The lost attention of layer {layer} is not finite: its q or k hold NaN or infinity. Load the model "
                "in bfloat16 or float32."
            )
        scores = lost if self.prior is None else lost * self.prior.values[layer]
        values = scores.tolist()
        ranked = sorted(range(len(values)), key=lambda head: (-values[head], head))
        heads = tuple(sorted(head for head in ranked[:room] if values[head] > self.threshold))
        return LayerChoice(tuple(lost.tolist()), tuple(values), heads)

    def validate(self, n_layers: int, n_heads: int) -> None:
        """Check that the prior and the budget fit a model, or raise a `HeadError`; called by `HybridAttention`."""
        if self.prior is not None and self.prior.shape != (n_layers, n_heads):
            raise HeadError(
                f"The prior is {self.prior.n_layers} x {self.prior.n_heads} (layers x heads), this model {n_layers} x "
                f"{n_heads}. Score the heads of this model."
            )
        self.budget.validate(n_layers, n_heads)
        self._n_layers = n_layers

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        prior = self.prior
        return {
            "policy": "QueryAwareHeads",
            "budget": self.budget.describe(),
            "queries": self.queries if isinstance(self.queries, int) else "mask",
            "order": self.order,
            "keys": self.keys,
            "block": None if self.keys == "exact" else self.block,
            "threshold": self.threshold,
            "prior": None if prior is None else {"name": prior.name, "provenance": prior.provenance},
            "sink": self.sink,
            "window": self.window,
        }

    def __repr__(self) -> str:
        prior = "" if self.prior is None else f", prior={self.prior.name}"
        keys = self.keys if self.keys == "exact" else f"{self.keys} of {self.block}"
        return f"QueryAwareHeads({self.budget}, keys={keys}, order={self.order}{prior})"
