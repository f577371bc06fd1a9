"""Random heads to compare a ranking's heads with: the same number, in the same layers, none of the ranked ones."""

import random
from dataclasses import dataclass

from hooked_mllm.heads import HeadSet, HeadsLike, parse_heads
from hooked_mllm.heads.head_scores import ScoresInput, check_scores


@dataclass(frozen=True)
class Control:
    """A control group; `random_control` draws one.

    Attributes:
        heads: The heads drawn.
        moved: How many of them are in another layer than the head that they are the control of.
    """

    heads: HeadSet
    moved: int


def random_control(
    scores: ScoresInput, ranked: HeadsLike, seed: int, *, keep_layer_histogram: bool = True, exclude_ranked: bool = True
) -> Control | None:
    """The same number of heads as `ranked` has, drawn at random from the measured ones.

    The draw is one shuffled order of all heads for each seed, so that the controls of growing sets mostly grow too.

    Args:
        scores: The scores whose measured heads are drawn from.
        ranked: The heads to compare with: a `HeadSet`, "L2H4, L3H1", pairs, a boolean mask, or a list of these.
        seed: Seed of the draw.
        keep_layer_histogram: Draw as many heads in each layer as `ranked` has there. A layer that has too few left
            gives all it has, and the rest is drawn from all other layers (`Control.moved` counts them).
        exclude_ranked: Draw none of the ranked heads.

    Returns:
        The control; None where fewer heads are left than were ranked, so that there is none.

    Raises:
        HeadError: for heads of a model of another shape, or something else than scores and heads.

    Examples:
        >>> from hooked_mllm import HeadScores
        >>> scores = HeadScores([[0.9, 0.8, 0.1, 0.2], [0.3, 0.4, 0.5, 0.6]])
        >>> control = random_control(scores, scores.top(2), seed=0)
        >>> control.heads.by_layer, control.moved
        ({0: (2, 3)}, 0)
    """
    check_scores(scores, "A random control")
    top = parse_heads(ranked, scores.shape, whose=scores.name)
    draw = random.Random(seed)
    order = sorted(sorted(scores.ranking), key=lambda _: draw.random())  # as HeadScores.random
    left = [head for head in order if not (exclude_ranked and head in top)]
    if len(left) < len(top):
        return None
    if not keep_layer_histogram:
        return Control(parse_heads(left[: len(top)], scores.shape), 0)
    drawn: list[tuple[int, int]] = []
    for layer, heads in top.by_layer.items():
        drawn += [head for head in left if head[0] == layer][: len(heads)]
    moved = len(top) - len(drawn)
    taken = set(drawn)
    drawn += [head for head in left if head not in taken][:moved]
    return Control(parse_heads(drawn, scores.shape), moved)
