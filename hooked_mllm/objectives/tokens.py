"""Tokens of an objective: ids, words that are one token, lists of these, or a function of the sample."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.display.read_heads import whole_number
from hooked_mllm.errors import InputError
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.objectives.logits import logit_positions

#: an id, a word that is one token, or several of them
TokenOrTokens = int | str | Sequence[int | str | np.integer] | Tensor | np.ndarray
#: the same for all samples, or a function of the `Sample`
Tokens = TokenOrTokens | Callable[[Sample], TokenOrTokens]
#: tokens after `check_tokens`
CheckedTokens = int | str | list[int | str] | Callable[..., Any]


def check_tokens(what: str, tokens: object) -> CheckedTokens:
    """Tokens as a list that can be read more than once, checked without a model."""
    if callable(tokens) or isinstance(tokens, str):
        return tokens
    token_id = whole_number(tokens)
    if token_id is not None:
        return token_id
    if not isinstance(tokens, Iterable) or getattr(tokens, "ndim", 1) == 0:
        raise InputError(
            f"{what} is a token id, a text of one token, a list of these, or a function of the sample; got "
            f"{type(tokens).__name__}."
        )
    checked: list[int | str] = []
    for token in tokens:
        entry = token if isinstance(token, str) else whole_number(token)
        if entry is None:
            raise InputError(f"{what} is a list of token ids and texts of one token; got {type(token).__name__} in it.")
        checked.append(entry)
    if not checked:
        raise InputError(f"{what} is an empty list: specify at least one token.")
    return checked


def token_ids(model: Model, what: str, tokens: CheckedTokens, inputs: ResolvedInput) -> list[list[int]]:
    """Ids of the tokens, a list for each sample; raises for tokens that the vocabulary lacks."""
    if not callable(tokens):
        return [_ids(model, what, tokens)] * inputs.batch
    return [_ids(model, f"{what}(sample)", tokens(sample)) for sample in _samples(inputs, what)]


def answer_tokens(model: Model, inputs: ResolvedInput, what: str) -> Int[Tensor, "batch n"]:
    """The teacher-forced answer of each sample, -1 after the end of shorter ones; raises for a sample without one."""
    samples = _samples(inputs, what)
    for sample in samples:
        if sample.answer is None:
            name = "a sample" if sample.id is None else f"sample {sample.id!r}"
            raise InputError(f"{what} reads the answer's tokens, and {name} has none: pass `answer=` to prepare.")
    positions = logit_positions(inputs, "answer")
    # [batch pos] -> [batch n]
    ids = inputs.tensors["input_ids"].cpu().gather(1, positions.clamp(min=0)).masked_fill(positions < 0, -1)
    unknown = _unknown_id(model)
    for sample, answer in zip(samples, ids.tolist(), strict=True):
        if unknown in answer:
            raise InputError(
                f"The answer {sample.answer!r} is not in the vocabulary: the tokenizer reads token "
                f"{answer.index(unknown)} of it as unknown (id {unknown}). Use words that the tokenizer contains."
            )
    return ids


def describe_tokens(tokens: CheckedTokens | None) -> Any:
    """Tokens as a record keeps them."""
    return f"function {getattr(tokens, '__qualname__', type(tokens).__name__)}" if callable(tokens) else tokens


def padded(lists: Sequence[Sequence[int]], fill: int) -> Int[Tensor, "batch n"]:
    """Lists of different lengths as one tensor."""
    width = max(map(len, lists))
    return torch.tensor([[*each, *[fill] * (width - len(each))] for each in lists])


def _samples(inputs: ResolvedInput, what: str) -> tuple[Sample, ...]:
    if inputs.samples:
        return inputs.samples
    raise InputError(
        f"{what} depends on the sample, and the input is a plain mapping: make samples with "
        "`model.prepare(question, images=..., answer=...)`, or specify tokens."
    )


def _ids(model: Model, what: str, tokens: object) -> list[int]:
    checked = check_tokens(what, tokens)
    if callable(checked):
        raise InputError(f"{what} must be tokens; got another function.")
    return list(dict.fromkeys(_id(model, what, t) for t in (checked if isinstance(checked, list) else [checked])))


def _id(model: Model, what: str, token: int | str) -> int:
    if not isinstance(token, str):
        if not 0 <= token < model.cfg.d_vocab:
            raise InputError(f"{what}: token id {token} is outside the vocabulary, 0 to {model.cfg.d_vocab - 1}.")
        return token
    if model.processor is None:
        raise InputError(f"{what} is a text, which needs a processor, and this model has none: use the token's id.")
    tokenizer = model.processor.tokenizer
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids)
        raise InputError(
            f"{what}: {token!r} is {len(ids)} tokens{f' ({pieces})' if ids else ''}, expected one. Use one of its "
            "tokens, or the whole answer: AnswerLogProb() on samples prepared with `answer=`."
        )
    if ids[0] == _unknown_id(model):
        raise InputError(
            f"{what}: {token!r} is not in the vocabulary: the tokenizer reads it as unknown (id {ids[0]}). Use a token "
            "that it contains, or an id."
        )
    return int(ids[0])


def _unknown_id(model: Model) -> int | None:
    return None if model.processor is None else getattr(model.processor.tokenizer, "unk_token_id", None)
