"""Tokens that an objective names: ids, words that are one token, lists of these, or a function of the sample."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.objectives.rows import positions_of

#: an id, a word that is one token, or several of them
TokenOrTokens = int | str | Sequence[int | str | np.integer] | Tensor | np.ndarray
#: the same for all samples, or a function that is given the `Sample`
Tokens = TokenOrTokens | Callable[[Any], TokenOrTokens]


def check_tokens(what: str, tokens: Any) -> Any:
    """Tokens as given, safe to read more than once; what cannot name tokens is refused before there is a model.

    Raises:
        InputError: for an empty list, or something else than ids, texts, lists of them and functions.
    """
    if callable(tokens) or isinstance(tokens, str):
        return tokens
    if _is_id(tokens):
        return int(tokens)
    if not isinstance(tokens, Iterable):
        raise InputError(
            f"{what} is a token id, a text of one token, a list of these, or a function of the sample; got "
            f"{type(tokens).__name__}."
        )
    each = list(tokens)
    if not each:
        raise InputError(f"{what} is an empty list: give one token at least.")
    for one in each:
        if not (isinstance(one, str) or _is_id(one)):
            raise InputError(f"{what} is a list of token ids and texts of one token; got {type(one).__name__} in it.")
    return [one if isinstance(one, str) else int(one) for one in each]


def token_ids(model: Model, what: str, tokens: Tokens, inputs: ResolvedInput) -> list[list[int]]:
    """Ids of the tokens, a list for each sample.

    Raises:
        InputError: for a token that the model's vocabulary lacks, a text of several tokens, or a function where there
            is no sample to give it.
    """
    if not callable(tokens):
        return [_ids(model, what, tokens)] * inputs.batch
    return [_ids(model, f"{what}(sample)", tokens(sample)) for sample in samples_of(inputs, what)]


def samples_of(inputs: ResolvedInput, what: str) -> tuple[Sample, ...]:
    """The samples behind the inputs.

    Raises:
        InputError: for a plain mapping.
    """
    if inputs.samples:
        return inputs.samples
    raise InputError(
        f"{what} depends on the sample, and a plain mapping of model inputs is none: make samples with "
        "`model.prepare(question, images=..., answer=...)`, or name tokens."
    )


def answer_tokens(model: Model, inputs: ResolvedInput, what: str) -> Int[Tensor, "batch n"]:
    """The teacher-forced answer of each sample, -1 after the end of shorter ones.

    Raises:
        InputError: for a sample without an answer, or with one that the tokenizer does not know.
    """
    for sample in samples_of(inputs, what):
        if sample.answer is None:
            name = "a sample" if sample.id is None else f"sample {sample.id!r}"
            raise InputError(f"{what} reads the answer's tokens, and {name} has none: give `answer=` to prepare.")
    at = positions_of(inputs, "answer")
    ids = inputs.tensors["input_ids"].cpu().gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)
    unknown = _unknown_id(model)
    if unknown is not None:
        for sample, row in zip(samples_of(inputs, what), ids.tolist(), strict=True):
            if unknown in row:
                raise InputError(
                    f"The answer {sample.answer!r} is not in the vocabulary: the tokenizer reads token "
                    f"{row.index(unknown)} of it as unknown (id {unknown}). Give an answer in words that it knows."
                )
    return ids


def describe_tokens(tokens: Any) -> Any:
    """Tokens as a record keeps them."""
    return f"function {getattr(tokens, '__qualname__', type(tokens).__name__)}" if callable(tokens) else tokens


def _ids(model: Model, what: str, tokens: Any) -> list[int]:
    tokens = check_tokens(what, tokens)
    if callable(tokens):
        raise InputError(f"{what} must be tokens; got another function.")
    if isinstance(tokens, str | int):
        return [_id(model, what, tokens)]
    return list(dict.fromkeys(_id(model, what, one) for one in tokens))


def _id(model: Model, what: str, token: int | str) -> int:
    if not isinstance(token, str):
        if not 0 <= token < model.cfg.d_vocab:
            raise InputError(f"{what}: token id {token} is outside the vocabulary, 0 to {model.cfg.d_vocab - 1}.")
        return token
    if model.processor is None:
        raise InputError(f"{what} is given as text, which needs a processor, and this model has none: give its id.")
    tokenizer = model.processor.tokenizer
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids)
        raise InputError(
            f"{what}: {token!r} is {len(ids)} tokens{f' ({pieces})' if ids else ''}, expected one. Give one of its "
            "tokens, or watch the whole answer: AnswerLogProb() on samples prepared with `answer=`."
        )
    if ids[0] == _unknown_id(model):
        raise InputError(
            f"{what}: {token!r} is not in the vocabulary: the tokenizer reads it as unknown (id {ids[0]}). Give a "
            "token that it knows, or an id."
        )
    return int(ids[0])


def _unknown_id(model: Model) -> int | None:
    return None if model.processor is None else getattr(model.processor.tokenizer, "unk_token_id", None)


def _is_id(token: Any) -> bool:
    if isinstance(token, Tensor | np.ndarray):
        return token.ndim == 0 and _is_id(token.item())
    return isinstance(token, int | np.integer) and not isinstance(token, bool)


def padded(rows: Sequence[Sequence[int]], fill: int) -> Int[Tensor, "batch n"]:
    """Rows of unequal length as one tensor."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
