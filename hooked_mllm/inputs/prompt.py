"""A chat prompt, and where its question and system text lie among the tokens.

A chat template is any program, so a text is located by rendering twice, with the text and with a unique sentinel.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Protocol, runtime_checkable

from hooked_mllm.errors import InputError, LayoutError

#: a range of characters or tokens, end exclusive
Span = tuple[int, int]

#: how templates begin and end a thought
_THOUGHTS = (
    *((f"<{tag}>", f"</{tag}>") for tag in ("think", "thinking", "thought", "reasoning", "seed:think")),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)


@runtime_checkable
class Processor(Protocol):
    """The part of a transformers processor that is used here."""

    tokenizer: Any
    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """The prompt of a conversation."""

    def __call__(self, **kwargs: Any) -> Mapping[str, Any]:
        """Model inputs of texts, images and videos."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that finds the tokens of a text."""

    def __call__(self, text: Any, **kwargs: Any) -> Mapping[str, Any]:
        """Token ids, and with `return_offsets_mapping=True` the characters of each token."""
        ...


def render(
    template: Processor, question: str, system: str | None = None, n_images: int = 0, n_videos: int = 0
) -> tuple[str, dict[str, Span]]:
    """The prompt of one question up to where the answer starts, and the character ranges of its texts."""
    texts = {"question": question} | ({} if system is None else {"system": system})
    rendered = _apply(template, texts, n_images, n_videos)
    # more X than the prompt has, so that no mark occurs in it
    tail = "X" * (rendered.count("X") + 1)
    marks = {name: f"XhookedX{name}{tail}" for name in texts}
    marked = _apply(template, marks, n_images, n_videos)
    for name, mark in marks.items():
        if marked.count(mark) != 1:
            advice = "Use another chat template" + (", or leave `system` out." if name == "system" else ".")
            raise LayoutError(
                f"The chat template holds the {name} {marked.count(mark)} times, where once was expected: its tokens "
                f"cannot be located. {advice}"
            )
    return rendered, _between(rendered, marked, texts, marks)


def token_spans(
    prompt: str, texts: Mapping[str, Span], tokenizer: Tokenizer, input_ids: Sequence[int], placeholders: set[int]
) -> dict[str, list[Span]]:
    """Token ranges of the prompt's `texts` among the processor's `input_ids`, end exclusive.

    `placeholders` are the ids of images and videos in the text, which the processor repeats.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise LayoutError(
            f"{type(tokenizer).__name__} gives no character offsets, so the question's tokens cannot be located: load "
            "the fast tokenizer of this checkpoint."
        )
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    at = [i for i, token in enumerate(ids) if token in placeholders]
    first, after = (at[0], at[-1] + 1) if at else (len(ids), 0)
    head, tail = ids[:first], ids[after:]
    if list(input_ids[: len(head)]) != head or list(input_ids[len(input_ids) - len(tail) :]) != tail:
        raise LayoutError(
            f"The processor returned {len(input_ids)} tokens that do not begin and end as the prompt's {len(ids)} do: "
            "it cut the prompt or added to it. Leave out truncation=, max_length= without padding=, and text_pair=."
        )
    spans = {}
    for name, (start, end) in texts.items():
        low, high = _tokens(prompt, offsets, start, end, name)
        shift = len(input_ids) - len(ids)
        if low >= after and list(input_ids[low + shift :]) == ids[low:]:
            spans[name] = [(low + shift, high + shift)]
        elif high <= first and list(input_ids[:high]) == ids[:high]:
            spans[name] = [(low, high)]
        else:
            where = "between its images and videos" if first < high and low < after else "with other tokens than alone"
            raise LayoutError(
                f"The {name} was not found: the prompt holds it {where}, so its tokens cannot be located. The prompt, "
                f"before images and videos are filled in: {prompt!r}"
            )
    return spans


def open_thought(prompt: str, question: Span) -> str | None:
    """The end of a thought that the prompt opens after its question, as templates of thinking models do."""
    tail = prompt[question[1] :]
    return next((end for start, end in _THOUGHTS if tail.rfind(start) > tail.rfind(end)), None)


def check_text(what: str, text: object) -> None:
    """Raise an InputError for what is no text, or an empty one."""
    if not isinstance(text, str):
        raise InputError(f"The {what} is a text; got {type(text).__name__}.")
    if not text.strip():
        raise InputError(f"The {what} is empty: give a text with one visible character at least.")


def check_special(text: str, what: str, tokenizer: Tokenizer, placeholders: Sequence[str] = ()) -> None:
    """Raise an InputError for a text with a special token or placeholder, which changes the prompt's meaning."""
    special = [str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special]
    tokens = sorted({t for t in (*special, *placeholders) if t and t in text})
    if tokens:
        raise InputError(
            f"The {what} contains {', '.join(map(repr, tokens))}, which this model reads as a special token and not as "
            "text. Write it differently; images and videos get their placeholders from `images=` and `videos=`."
        )


def _apply(template: Processor, texts: Mapping[str, str], n_images: int, n_videos: int) -> str:
    parts = [{"type": "image"} for _ in range(n_images)] + [{"type": "video"} for _ in range(n_videos)]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": texts["question"]}]}]
    if "system" in texts:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": texts["system"]}]})
    if not getattr(template, "chat_template", None):
        name = type(template).__name__
        raise InputError(f"{name} has no chat template: set `processor.chat_template`, or load the checkpoint's own.")
    try:
        return template.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is free to raise anything, among it jinja2's own errors
        raise InputError(f"The chat template rejects this conversation: {error}") from error


def _between(rendered: str, marked: str, texts: Mapping[str, str], marks: Mapping[str, str]) -> dict[str, Span]:
    """Character ranges, from the parts around the sentinels; a template may strip the texts."""
    order = sorted(texts, key=lambda name: marked.index(marks[name]))
    pieces, rest = [], marked
    for name in order:
        before, rest = rest.split(marks[name])
        pieces.append(before)
    for strips in product((str, str.strip, str.rstrip, str.lstrip), repeat=len(order)):
        spans, built = {}, ""
        for name, before, strip in zip(order, pieces, strips, strict=True):
            start = len(built) + len(before)
            built += before + strip(texts[name])
            spans[name] = (start, len(built))
        if built + rest == rendered:
            return spans
    raise LayoutError(
        "The question was not found: the chat template changes its texts, or the rest depending on them. "
        f"With the question it gives {rendered!r}, with a mark instead of it {marked!r}."
    )


def _tokens(text: str, offsets: Sequence[Span], start: int, end: int, name: str) -> Span:
    """The tokens with a character of a text; one that the template shares only if that is not white space."""
    inside = [
        token
        for token, (a, b) in enumerate(offsets)
        if a < end and b > start and ((start <= a and b <= end) or text[max(a, start) : min(b, end)].strip())
    ]
    if not inside:
        raise LayoutError(f"The {name} was not found: no token holds one of its characters.")
    return inside[0], inside[-1] + 1
