"""GradientAgreement: evidence by gradients of the answer's score with respect to visual embeddings."""

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.cache.run import frozen_parameters
from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.hooks import HookPoint
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.metrics.annotation_free.evidence import EvidenceAgreement, visual_points, with_greedy_answer

if TYPE_CHECKING:
    Rule = Literal["norm", "gradient_x_input"]
else:  # at run time wider, so that another value reaches the check whose error lists the choices
    Rule = str

RULES: tuple[Rule, ...] = ("norm", "gradient_x_input")


@checked
class GradientAgreement(EvidenceAgreement):
    r"""Attention to the visual tokens on which the model's own answer depends, by gradients. No target.

    $$\text{score}[l,h] = \sum_{j\in V} \frac{r[j]}{\sum_i r[i]}\, a^{l,h}[j],\qquad
    s = \sum_t \log\frac{p(y_t)}{1 - p(y_t)}$$

    $$r[j] = \sum_p \lVert \nabla_{x_p[j]}\, s\rVert^2 \ \text{ or }\ \Big|\sum_p x_p[j]\cdot\nabla_{x_p[j]}\, s\Big|$$

    - $a[j]$: mean attention of the query tokens to visual token j; $V$: all visual tokens.
    - $x_p[j]$: visual features entering the language model at j: the embedding and, in Qwen3-VL, DeepStack's additions.
    - $y$: the greedy answer; the log-odds have the direction of the gradient of log p, and do not vanish as p nears 1.

    In [0, 1], averaged over samples. It needs two more forward passes and a backward pass per sample, which keeps the
    activations of all layers: far more memory than measuring.

    Args:
        rule: "norm" (squared length of the gradient) or "gradient_x_input" (its product with the features).
        queries: Name of the mask of query tokens.
        n_tokens: Number of explained tokens of the greedy answer, at least 1.

    Source: saliency, arXiv:1312.6034 (norm), and gradient x input, arXiv:1605.01713, as the region of
    arXiv:2606.05843 eq. 1.

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
        >>> samples = toys.VisualRetrieval(pages=1).samples(model, 4)
        >>> scores = metrics.GradientAgreement().run(model, samples, progress=False)
        >>> sorted(scores.top(4))  # planted
        [(2, 4), (2, 5), (2, 6), (2, 7)]
    """

    def __init__(self, *, rule: Rule = "norm", queries: str = "question", n_tokens: int = 1) -> None:
        super().__init__(queries=queries, n_tokens=n_tokens)
        if rule not in RULES:
            raise InputError(f"rule must be one of {', '.join(RULES)}; got {rule!r}.")
        self.rule: Rule = rule

    def relevance(self, model: Model, sample: Sample) -> Float[Tensor, " pos"]:
        """The squared gradient, or gradient times input, of all features that enter at each position."""
        forced, answer = with_greedy_answer(model, sample, self.n_tokens)
        leaves: dict[str, Tensor] = {}

        def leaf(value: Tensor, hook: HookPoint) -> Tensor:
            leaves[hook.name] = value.detach().requires_grad_(True)
            return leaves[hook.name]

        hooks = [(name, leaf) for name in visual_points(model)]
        with frozen_parameters(model), torch.enable_grad(), model.hooks(hooks):
            logits = model(forced, logits_to_keep=len(answer))[0].float()
            log_odds(logits, answer.to(logits.device)).sum().backward()
        total = torch.zeros(len(sample), dtype=torch.float64)
        for value in leaves.values():
            assert value.grad is not None
            gradient, features = value.grad[0, : len(sample)].double(), value.detach()[0, : len(sample)].double()
            part = gradient.square() if self.rule == "norm" else gradient * features
            total += part.sum(-1).cpu()
        return total.abs()


def log_odds(logits: Float[Tensor, "token vocab"], answer: Tensor) -> Float[Tensor, " token"]:
    """`log p / (1 - p)` of each answer token, from logits, since p itself may round to 1."""
    others = logits.scatter(1, answer[:, None], -torch.inf)
    return logits.gather(1, answer[:, None])[:, 0] - others.logsumexp(1)
