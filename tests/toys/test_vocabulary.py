"""The words of the tasks and their tokenizer."""

import pytest

from helpers import toy_witness as witness
from hooked_mllm.toys import VisualRetrieval
from hooked_mllm.toys.vocabulary import (
    COLORS,
    FAMILIES,
    FILLER,
    PAD_TOKEN,
    SHAPES,
    SPECIAL_TOKENS,
    TEMPLATES,
    TURN_END,
    VISUAL_TOKENS,
    build_tokenizer,
    special_tokens,
    vocabulary,
    words,
)


def test_the_tokenizer_has_every_word_of_the_task():
    tokenizer = witness.processor().tokenizer
    assert set(tokenizer.get_vocab()) == {*SPECIAL_TOKENS, *words()}
    for example in VisualRetrieval(seed=8, pages=1).examples(50):
        for text in (example.question, example.system, example.answer):
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.tokenize("zebra <1.5 seconds>") == ["<|unk|>", "<", "1", ".", "5", "seconds", ">"]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_follow_the_order_of_the_vocabulary(family):
    tokenizer = build_tokenizer(family)
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == vocabulary(family)
    assert vocabulary(family)[: len(special_tokens(family))] == list(special_tokens(family))
    assert len(set(vocabulary(family))) == len(vocabulary(family)), "each token once"
    for token in VISUAL_TOKENS[family].values():
        assert tokenizer.tokenize(f"the {token} star") == ["the", token, "star"]


def test_words_are_lower_case_and_digits_are_single():
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("The STAR, 42 !") == ["the", "star", ",", "4", "2", "!"]
    assert tokenizer.decode(tokenizer("red star")["input_ids"]) == "red star"
    assert tokenizer.padding_side == "left" and tokenizer.pad_token == PAD_TOKEN and tokenizer.eos_token == TURN_END


def test_every_word_of_every_question_is_known():
    known = set(words())
    for template in TEMPLATES:
        for shape in SHAPES:
            question = template.format(shape).lower().replace("?", " ?").replace(".", " .")
            assert set(question.split()) <= known
    assert {*COLORS, *FILLER} <= known
