"""Random controls of ranked heads: the same number, in the same layers, none of the ranked heads."""

import random
from dataclasses import dataclass

from hooked_mllm.checks import checked
from hooked_mllm.heads import HeadSet, HeadsLike, parse_heads
from hooked_mllm.heads.counting import Seed, check_seed
from hooked_mllm.heads.head_scores import ScoresInput, check_scores


@checked
@dataclass(frozen=True)
class Control:
    """Heads drawn by `random_control`; `moved` of them are in another layer than the ranked head that they replace."""

    heads: HeadSet
    moved: int


@checked
def random_control(
    scores: ScoresInput,
    ranked: HeadsLike,
    seed: Seed,
    *,
    keep_layer_histogram: bool = True,
    exclude_ranked: bool = True,
) -> Control | None:
    """The same number of heads as in `ranked`, drawn at random; None if fewer heads are left than were ranked.

    A seed determines one order of all heads, so that the controls of growing sets mostly grow, too.

    Args:
        scores: Scores; heads are drawn from those that were measured.
        ranked: The ranked heads: a `HeadSet`, "L2H4, L3H1", pairs, a boolean mask, or a list of these.
        seed: Seed of the order.
        keep_layer_histogram: Draw the same number of heads in each layer as `ranked` has there; if a layer has too few
            left, from other layers (`Control.moved` counts these).
        exclude_ranked: Draw none of the ranked heads.

    Examples:
        >>> from hooked_mllm import HeadScores
        >>> scores = HeadScores([[0.9, 0.8, 0.1, 0.2], [0.3, 0.4, 0.5, 0.6]])
        >>> control = random_control(scores, scores.top(2), seed=0)
        >>> control.heads.by_layer, control.moved
        ({0: (2, 3)}, 0)
    """
    check_scores(scores, "A random control")
    top = parse_heads(ranked, scores.shape, whose=scores.name)
    generator = random.Random(check_seed(seed))
    order = sorted(sorted(scores.ranking), key=lambda _: generator.random())  # as HeadScores.random
    candidates = [head for head in order if not (exclude_ranked and head in top)]
    if len(candidates) < len(top):
        return None
    if not keep_layer_histogram:
        return Control(parse_heads(candidates[: len(top)], scores.shape), 0)
    drawn: list[tuple[int, int]] = []
    for layer, heads in top.by_layer.items():
        drawn += [head for head in candidates if head[0] == layer][: len(heads)]
    moved = len(top) - len(drawn)
    drawn += [head for head in candidates if head not in drawn][:moved]
    return Control(parse_heads(drawn, scores.shape), moved)
