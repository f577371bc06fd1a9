"""Random heads to compare a ranking's heads with: as many, in the same layers, none of the ranked ones."""

import random
from dataclasses import dataclass

from hooked_mllm.errors import HeadError
from hooked_mllm.heads import HeadScores, HeadSet


@dataclass(frozen=True)
class Control:
    """A control group; `random_control` draws one.

    Attributes:
        heads: The heads drawn.
        moved: How many of them stand in another layer than the head they are the control of.
    """

    heads: HeadSet
    moved: int


def random_control(
    scores: HeadScores, ranked: HeadSet, seed: int, *, keep_layer_histogram: bool = True, exclude_ranked: bool = True
) -> Control | None:
    """As many heads as `ranked` has, drawn at random from the measured ones.

    The draw is one shuffled order of all heads for each seed, so that the controls of growing sets mostly grow too.

    Args:
        scores: Whose heads to draw from.
        ranked: The heads to compare with.
        seed: Seed of the draw.
        keep_layer_histogram: Draw as many heads in each layer as `ranked` has there. A layer that has too few left
            gives all it has, and the rest is drawn from all other layers (`Control.moved` counts them).
        exclude_ranked: Draw none of the ranked heads.

    Returns:
        The control; None where fewer heads are left than were ranked, so that there is none.

    Raises:
        HeadError: for heads of a model of another shape.

    Examples:
        >>> scores = HeadScores([[0.9, 0.8, 0.1, 0.2], [0.3, 0.4, 0.5, 0.6]])
        >>> control = random_control(scores, scores.top(2), seed=0)
        >>> control.heads.by_layer, control.moved
        ({0: (2, 3)}, 0)
    """
    if ranked.shape != scores.shape:
        raise HeadError(f"The scores are {scores.shape} (layers, heads), the ranked heads {ranked.shape}.")
    draw = random.Random(seed)
    order = sorted(sorted(scores.ranking), key=lambda _: draw.random())  # as HeadScores.random
    left = [head for head in order if not (exclude_ranked and head in ranked)]
    if len(left) < len(ranked):
        return None
    if not keep_layer_histogram:
        return Control(_heads(scores, left[: len(ranked)]), 0)
    drawn: list[tuple[int, int]] = []
    for layer, heads in ranked.by_layer.items():
        drawn += [head for head in left if head[0] == layer][: len(heads)]
    moved = len(ranked) - len(drawn)
    taken = set(drawn)
    drawn += [head for head in left if head not in taken][:moved]
    return Control(_heads(scores, drawn), moved)


def _heads(scores: HeadScores, heads: list[tuple[int, int]]) -> HeadSet:
    return HeadSet(heads, n_layers=scores.n_layers, n_heads=scores.n_heads)
