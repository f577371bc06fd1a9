"""Visual attention sinks: image tokens with high attention that have no part in the answer."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.metrics.base import HeadMetric

#: sink dimensions of the residual stream that the paper prints, by language model
PUBLISHED_DIMS = {"Llama-2-7B": (2533, 1415), "Llama-2-13B": (2100, 4743), "Qwen2-7B": (458, 2570)}


def sink_strength(
    residual: Float[Tensor, "batch pos d_model"], dims: Sequence[int], eps: float = 1e-6
) -> Float[Tensor, "batch pos"]:
    r"""$\phi(x) = \max_{d\in D} |\mathrm{RMSNorm}(x)[d]|$, without the norm's gain."""
    wide = residual.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed[..., list(dims)].abs().amax(-1)


@checked
def massive_dims(residual: Float[Tensor, "batch pos d_model"], k: int = 2) -> tuple[int, ...]:
    """The `k` dimensions in which the first token's residual stream is largest: candidates for `dims`.

    Our adaptation for models without published sink dimensions (such as Qwen3 and InternVL3.5): the massive
    activations are in the dimensions in which the first token, the strongest sink, has them. Use the residual of a
    middle layer of one unpadded sample, `cache["resid_pre", layer]`, and compare several.

    Examples:
        >>> massive_dims(torch.tensor([[[0.1, -9.0, 0.2, 5.0], [1.0, 0.0, 0.0, 0.0]]]))
        (1, 3)
    """
    if not 1 <= k <= residual.shape[-1] or not residual.shape[1]:
        raise InputError(f"Expected k from 1 to {residual.shape[-1]} and a position at least; got {k}.")
    return tuple(residual[:, 0].double().abs().mean(0).topk(k).indices.tolist())


@checked
class VisualSinkShare(HeadMetric):
    r"""The share of a head's attention on the image that falls on visual sinks.

    $$r^{l,h} = \frac{\sum_{j\in V\cap B_l} a^{l,h}[j]}{\sum_{j\in V} a^{l,h}[j]},\qquad
    B_l = \Big\{j : \max_{d\in D}\big|\mathrm{RMSNorm}(x_j^l)[d]\big| > \tau\Big\}$$

    - $a^{l,h}$: the mean attention row of the query tokens; with "last", one row as in the paper.
    - $V$: visual tokens; $x_j^l$: the residual stream entering layer l; $D$: `dims`; $\tau$: `tau`.

    In [0, 1], averaged over samples. The paper calls a head image-centric for a query if `VisualNonSinkRatio` is at
    least 0.5 (one minus this) and its `VisionMass` at least 0.2.

    The released code differs: it adds 1e-6 to every entry of the denominator, so that the ratio depends a little on the
    number of tokens, and redistributes with p the share that *stays* where the paper's p is the share that moves.

    Args:
        dims: The sink dimensions D: `PUBLISHED_DIMS`, or for other models those of `massive_dims`.
        tau: Strength above which a token is a sink, above 0.
        queries: Name of the mask of query tokens.

    Source: arXiv:2503.03321.

    Examples:
        >>> from hooked_mllm.metrics import VisualSinkShare
        >>> VisualSinkShare(dims=(458, 2570))
        VisualSinkShare(dims=(458, 2570), tau=20.0, queries='last')
    """

    needs_residual = True

    def __init__(self, *, dims: Sequence[int], tau: float | int = 20.0, queries: str = "last") -> None:
        super().__init__()
        if not len(dims) or min(dims) < 0 or not tau > 0:
            raise InputError(f"Expected one or more dimensions >= 0 and tau > 0; got dims={dims!r}, tau={tau!r}.")
        self.dims, self.tau, self.queries = tuple(int(d) for d in dims), float(tau), queries

    def sinks(self, view: AttentionView) -> Bool[Tensor, "layer batch pos"]:
        """The sinks among all tokens, layer by layer."""
        residual = view.context.residual
        width = residual[0].shape[-1]
        if max(self.dims) >= width:
            raise InputError(f"{self!r}: the residual stream has dimensions 0 to {width - 1}.")
        # a strength of tau up to the rounding of float32 is none above it
        return torch.stack([sink_strength(x, self.dims) > self.tau * (1 + 1e-5) for x in residual])

    def score(self, view: AttentionView) -> Float[Tensor, "layer batch head"]:
        """The share on sinks."""
        on_image = view.profile(self.queries).double() * view.visual[:, None]
        on_sinks = (on_image * self.sinks(view)[:, :, None]).sum(-1)
        return on_sinks / on_image.sum(-1).clamp(min=torch.finfo(torch.float64).tiny)


@checked
class VisualNonSinkRatio(VisualSinkShare):
    r"""The share of a head's attention on the image that is not on visual sinks: $1 - r$ of `VisualSinkShare`.

    Source: arXiv:2503.03321 (visual non-sink ratio).

    Examples:
        >>> from hooked_mllm.metrics import VisualNonSinkRatio
        >>> VisualNonSinkRatio(dims=[3]).config()["tau"]
        20.0
    """

    def score(self, view: AttentionView) -> Float[Tensor, "layer batch head"]:
        """The share outside sinks."""
        return 1.0 - super().score(view)
