"""The written form of attention heads: `L2H4` as text, written and read."""

import re
from collections.abc import Iterable

from hooked_mllm.errors import HeadError

_NAME = re.compile(r"\s*L(\d+)\s*H(\d+)\s*", re.IGNORECASE)
_SEPARATOR = re.compile(r"[,;\s]+")


def head_name(layer: int, head: int) -> str:
    """The name of a head.

    Examples:
        >>> head_name(20, 15)
        'L20H15'
    """
    return f"L{layer}H{head}"


def head_names(heads: Iterable[tuple[int, int]]) -> list[str]:
    """The names of heads, in order.

    Examples:
        >>> head_names([(2, 4), (3, 1)])
        ['L2H4', 'L3H1']
    """
    try:
        return [head_name(layer, head) for layer, head in heads]
    except (TypeError, ValueError):
        raise HeadError(f"Expected (layer, head) pairs, such as (2, 4); got {shortened_repr(heads)}.") from None


def parse_head(text: str) -> tuple[int, int]:
    """The (layer, head) of a name such as "L20H15"."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise HeadError(
            f"Expected a head written like 'L20H15' (layer 20, head 15, both from 0); got {shortened_repr(text)}."
        )
    return int(match[1]), int(match[2])


def parse_names(text: str) -> list[tuple[int, int]]:
    """The heads of a text such as "L20H15, L3H2"; empty text has none."""
    if _NAME.fullmatch(text):
        return [parse_head(text)]
    return [parse_head(name) for name in _SEPARATOR.split(text) if name]


def is_heads_text(text: str) -> bool:
    """Whether a text is the names of one or more heads."""
    try:
        return len(parse_names(text)) > 0
    except HeadError:
        return False


def shortened_repr(value: object) -> str:
    """The repr of a value, cut after 80 characters, for an error message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}... ({type(value).__name__})"
