"""Attention mass on a set of keys."""

from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.checks.shapes import checked
from hooked_mllm.errors import InputError


@checked
def attention_profile(
    pattern: Float[Tensor, "*axes query key"], queries: Bool[Tensor, " query"]
) -> Float[Tensor, "*axes key"]:
    r"""The mean attention row over the query tokens: $a[j] = \frac{1}{|Q|}\sum_{i\in Q} A[i,j]$.

    Args:
        pattern: Attention after the softmax, [... query key], one row per position.
        queries: True at the query tokens Q, at least one.

    Source: arXiv:2606.05843 eq. 22.

    Examples:
        >>> import torch
        >>> pattern = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
        >>> attention_profile(pattern, torch.tensor([True, True])).tolist()
        [0.75, 0.25]
    """
    if not bool(queries.any()):
        raise InputError("No query token is chosen: the mean over no rows is not defined.")
    return pattern[..., queries, :].mean(-2)


@checked
def attention_mass(
    pattern: Float[Tensor, "*axes query key"], queries: Bool[Tensor, " query"], keys: Bool[Tensor, " key"]
) -> Float[Tensor, "*axes"]:
    r"""The attention that the query tokens pay to the keys: $\frac{1}{|Q|}\sum_{i\in Q}\sum_{j\in K} A[i,j]$.

    With the question as Q, this is Retrieval Attention Mass for K the target and vision mass for K all visual tokens.
    In [0, 1], summed in the dtype of the pattern.

    Args:
        pattern: Attention after the softmax, [... query key], one row per position.
        queries: True at the query tokens Q, at least one.
        keys: True at the key tokens K.

    Source: arXiv:2606.05843 eq. 1.

    Examples:
        >>> import torch
        >>> pattern = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
        >>> attention_mass(pattern, torch.tensor([False, True]), torch.tensor([True, False])).item()
        0.5
    """
    return attention_profile(pattern, queries)[..., keys].sum(-1)
