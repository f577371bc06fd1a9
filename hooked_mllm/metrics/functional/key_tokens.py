"""Key tokens: the positions that a head attends to most, and how much of a target they hold."""

from numbers import Real

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.attention.row_statistics import coverage_by_rank, first_rank, top_mask
from hooked_mllm.checks.shapes import checked
from hooked_mllm.errors import InputError
from hooked_mllm.heads.counting import Share, share_count


@checked
def key_tokens(profile: Float[Tensor, "*axes key"], share: Share = 0.05) -> Bool[Tensor, "*axes key"]:
    r"""The set S of the `ceil(share * N)` largest entries of a profile; ties to the lower index.

    Args:
        profile: Mean attention rows, [... key], over all N >= 1 positions of the sequence, without padding.
        share: Above 0 and at most 1.

    Source: arXiv:2606.05843 eq. 22.

    Examples:
        >>> import torch
        >>> key_tokens(torch.tensor([0.2, 0.4, 0.4]), share=0.3).tolist()
        [False, True, False]
    """
    n = profile.shape[-1]
    if not isinstance(share, Real) or not 0.0 < share <= 1.0 or not n:
        raise InputError(f"Expected a share above 0 and at most 1 of at least one position; got {share!r} of {n}.")
    return top_mask(profile, share_count(share, n))


@checked
def key_token_ratio(
    profile: Float[Tensor, "*axes key"], target: Bool[Tensor, " key"], share: Share = 0.05
) -> Float[Tensor, "*axes"]:
    r"""Key Token Ratio: $|S\cap K^*|\,/\,|K^*|$, float64.

    Args:
        profile: Mean attention rows, [... key], over all N positions of the sequence, without padding.
        target: True at the target tokens K*, at least one.
        share: Share of the sequence in S, above 0 and at most 1.

    Source: arXiv:2606.05843 eq. 23.

    Examples:
        >>> import torch
        >>> key_token_ratio(torch.tensor([0.1, 0.6, 0.3]), torch.tensor([False, True, True]), share=0.3).item()
        0.5
    """
    _check_target(target)
    return key_tokens(profile, share)[..., target].double().mean(-1)


@checked
def key_token_coverage(
    profile: Float[Tensor, "head key"], target: Bool[Tensor, " key"], share: Share = 0.05
) -> Float[Tensor, " k"]:
    r"""Key Token Coverage of the first k heads, for every k: $\big|\bigcup_{h<k}(S^h\cap K^*)\big|\,/\,|K^*|$.

    Args:
        profile: Mean attention rows of heads in the order of a ranking, [head key], over all N positions.
        target: True at the target tokens K*, at least one.
        share: Share of the sequence in each S, above 0 and at most 1.

    Source: arXiv:2606.05843 eq. 24 and 25.

    Examples:
        >>> import torch
        >>> profile = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.2, 0.7]])
        >>> key_token_coverage(profile, torch.tensor([False, True, True]), share=0.3).tolist()
        [0.5, 1.0]
    """
    _check_target(target)
    n = profile.shape[0]
    ranks = torch.arange(n, device=profile.device)[None]
    best = first_rank(key_tokens(profile, share)[None, None], ranks, n)  # [1 key]
    return coverage_by_rank(best, target[None], n)[0, 1:]


def _check_target(target: Tensor) -> None:
    if not bool(target.any()):
        raise InputError("The target is empty: a share of no tokens is not defined.")
