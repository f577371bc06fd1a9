"""The question's tokens are found exactly, by an oracle that shares nothing with the code: the bytes of each token."""

import json
import unicodedata
from functools import cache
from types import MappingProxyType

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from helpers.tiny import FAMILIES, tiny_config, tiny_frames, tiny_image, tiny_processor
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.families.registry import family_of
from hooked_mllm.inputs.preparer import Preparer
from hooked_mllm.inputs.prompt import check_text

# byte-level tokenizers write printable bytes as themselves and number the rest from U+0100
PRINTABLE = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
BYTE = {chr(b): b for b in PRINTABLE}
BYTE |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
QWEN = "<|im_end|>\n<|im_start|>assistant\n"
TAIL = {"qwen3_vl": QWEN, "internvl": QWEN, "llava_onevision": QWEN.replace("\n", "", 1)}
SCRIPTS = {
    "Chinese": "杯子是什么颜色？",
    "Arabic": "ما لون الكوب؟",
    "Hindi": "कप किस रंग का है?",
    "Korean jamo": "\u1112\u1161\u11ab\u1100\u116e\u11a8",
    "emoji": "👩🏽‍🚀🏳️‍🌈 where is the 🐕‍🦺?",
    "combining marks": "Zoe\u0308 a\u0327\u0301 z\u0335\u0321\u0315\u035c",
    "composition excluded": "\u0958 \u2126 \ufb1d",
    "leading space": "   the mug",
    "trailing space": "the mug  \t ",
    "leading newline": "\n\nthe mug",
    "no-break space": "\u00a0the mug\u00a0",
    "joiner first": "\u200dthe mug",
    "only punctuation": "?",
    "template word": "user",
}


@cache
def preparer(family: str) -> Preparer:
    config = tiny_config(family)
    return Preparer(tiny_processor(family), config, family_of(config))


@cache
def with_template(family: str, template: str) -> Preparer:
    config, processor = tiny_config(family), tiny_processor(family)
    processor.chat_template = template
    return Preparer(processor, config, family_of(config))


def token_bytes(tokenizer, ids) -> list[bytes]:
    special = set(tokenizer.all_special_tokens)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [t.encode() if t in special else bytes(BYTE[c] for c in t) for t in tokens]


def text_of(prepare, ids) -> str:
    return b"".join(token_bytes(prepare.tokenizer, ids)).decode()


def parts(prepare, sample, name="question") -> tuple[str, str, str]:
    """The text before, in and after the one span of that name."""
    ((start, end),) = sample.layout.spans(name)
    ids = sample.inputs["input_ids"][0].tolist()
    return text_of(prepare, ids[:start]), text_of(prepare, ids[start:end]), text_of(prepare, ids[end:])


def media(kind: str) -> dict:
    return {
        "text": {},
        "image": {"images": tiny_image()},
        "images": {"images": [tiny_image(), tiny_image(20, 30)]},
        "video": {"videos": [(tiny_frames(3), 2.0)]},
        "both": {"images": tiny_image(), "videos": [(tiny_frames(3), 2.0)]},
    }[kind]


def check(family: str, prepare, sample, question: str) -> None:
    before, inside, after = parts(prepare, sample)
    assert inside.strip() == unicodedata.normalize("NFC", question).strip()
    assert after.lstrip() == TAIL[family]
    assert before.rstrip().endswith(("<|im_start|>user", "<|vision_end|>", "</img>", "<image>", "<video>"))


@pytest.mark.parametrize("kind", ["text", "image", "images", "video", "both"])
@pytest.mark.parametrize("question", SCRIPTS.values(), ids=SCRIPTS)
def test_questions_in_any_script(family, kind, question):
    prepare = preparer(family)
    check(family, prepare, prepare(question, **media(kind)), question)


visible = st.text(min_size=1, max_size=40).filter(lambda text: text.strip())
spoken = st.text(st.sampled_from("user assistant\n ?Frame1: <0.2 seconds>é世\u0301👩\u200d"), min_size=1).filter(
    str.strip
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FAMILIES), st.sampled_from(["text", "image", "video"]), st.one_of(visible, spoken))
@example("internvl", "video", "Frame1: ")
@example("qwen3_vl", "video", "<0.2 seconds>")
@example("llava_onevision", "image", "\u0301")
def test_any_unicode_question(family, kind, question):
    prepare = preparer(family)
    check(family, prepare, prepare(question, **media(kind)), question)


plain = st.text(st.sampled_from("abc ?.:\nuser "), max_size=8)


@settings(max_examples=80, deadline=None)
@given(
    plain,
    plain,
    st.one_of(visible, spoken, st.text(st.sampled_from("abuser ?\n"), min_size=1).filter(str.strip)),
    st.booleans(),
)
@example("a a ", " a", "a", False)
@example("user: ", "", "  user: user ", True)
def test_any_template(before, after, question, trims):
    """Words of the question stand around it, touching it; the oracle counts bytes."""
    shown = "part.text | trim" if trims else "part.text"
    template = (
        f"{{{{- {json.dumps(before)} -}}}}{{%- for part in messages[0].content -%}}{{{{- {shown} -}}}}{{%- endfor -%}}"
        f"{{{{- {json.dumps(after)} -}}}}"
    )
    text = question.strip() if trims else question
    composed = unicodedata.normalize("NFC", text)
    # a mark that composes with the template's last letter has no place of its own
    assume(unicodedata.normalize("NFC", before + text + after) == before + composed + after)
    prepare = with_template("internvl", template)
    sample = prepare(question)
    pieces = token_bytes(prepare.tokenizer, sample.inputs["input_ids"][0].tolist())
    assert b"".join(pieces).decode() == before + composed + after
    low = len(before.encode())
    high = low + len(composed.encode())
    expected, at = [], 0
    whole = b"".join(pieces)
    for piece in pieces:
        start, at = at, at + len(piece)
        shared = whole[max(start, low) : min(at, high)]
        alone = low <= start and at <= high
        expected.append(bool(shared) and (alone or bool(shared.decode(errors="replace").strip())))
    assert sample.layout.question.tolist() == expected


def test_the_same_words_elsewhere(family):
    prepare, question = preparer(family), "a mug is a mug"
    sample = prepare(question, images=tiny_image(), system=f"{question}. {question}", answer=f" {question}")
    before, inside, after = parts(prepare, sample)
    assert inside == question
    assert before.count(question) == 2
    assert after == TAIL[family] + " " + question
    assert parts(prepare, sample, "system")[1] == f"{question}. {question}"
    assert parts(prepare, sample, "answer") == (before + question + TAIL[family], " " + question, "")


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_system_and_answer_in_any_script(family, text):
    prepare = preparer(family)
    sample = prepare("What?", images=tiny_image(), system=text, answer=text)
    composed = unicodedata.normalize("NFC", text)
    assert parts(prepare, sample, "system")[1].strip() == composed.strip()
    assert parts(prepare, sample, "system")[2].lstrip().startswith("<|im_end|>")
    assert parts(prepare, sample, "answer")[1:] == (composed, "")
    assert parts(prepare, sample)[1] == "What?"


@pytest.mark.parametrize("where", ["question", "system"])
def test_text_like_a_special_token_is_rejected(family, where):
    prepare = preparer(family)
    for token in [*prepare.tokenizer.all_special_tokens, prepare.processor.image_token, prepare.processor.video_token]:
        texts = {"question": "What?", "system": "Be brief."} | {where: f"What is {token}?"}
        with pytest.raises(InputError, match=f"The {where}.* contains .*special token"):
            prepare(**texts)


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_text_is_rejected(family, empty):
    with pytest.raises(InputError, match="The question is empty"):
        preparer(family)(empty)
    with pytest.raises(InputError, match="The system prompt is empty"):
        preparer(family)("What?", system=empty)


@pytest.mark.parametrize("wrong", [None, 7, b"bytes", ["a"]])
def test_what_is_no_text_is_rejected(wrong):
    with pytest.raises(InputError, match=f"The question is a text; got {type(wrong).__name__}"):
        check_text("question", wrong)


ONE = "{{- messages[-1].content[-1].text -}}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{- 'nothing' -}}", "holds the question 0 times"),
        (ONE + ONE, "holds the question 2 times"),
        ("{{- messages[-1].content[-1].text | upper -}}", "holds the question 0 times"),
        (
            "{{- messages[-1].content[-1].text | replace('m', 'w') -}}",
            "question was not found: the chat template changes",
        ),
        ("{%- if 'mug' in messages[-1].content[-1].text -%}a{%- endif -%}" + ONE, "question was not found"),
        ("{{- raise_exception('only text') -}}", "rejects this conversation: only text"),
        (None, "has no chat template"),
    ],
    ids=["drops", "repeats", "upper", "replaces", "depends on it", "raises", "none"],
)
def test_templates_that_hide_the_question(template, message):
    error = InputError if "rejects" in message or "no chat" in message else LayoutError
    with pytest.raises(error, match=message):
        with_template("internvl", template)("What colour is the mug?")


def test_a_question_before_the_images_is_found(family):
    image = {"qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>", "llava_onevision": "<image>"}
    mark = image.get(family, "<IMG_CONTEXT>")
    prepare = with_template(family, ONE + "{{- '\n" + mark + " end' -}}")
    before, inside, after = parts(prepare, prepare("end of the mug end", images=tiny_image()))
    assert (before, inside) == ("", "end of the mug end")
    assert after.endswith(" end")


def test_a_question_between_images_is_rejected():
    prepare = with_template("internvl", "{{- '<IMG_CONTEXT>' -}}" + ONE + "{{- '<IMG_CONTEXT>' -}}")
    with pytest.raises(LayoutError, match="question was not found: the prompt holds it between its images"):
        prepare("the mug", images=[tiny_image(), tiny_image()])


def test_a_tokenizer_without_offsets_is_rejected():
    class Slow:
        is_fast = False
        pad_token_id = 0
        added_tokens_decoder = MappingProxyType({})

        def __call__(self, text, **options):
            return {"input_ids": [0]}

        def convert_tokens_to_ids(self, token):
            return 0

    source = preparer("internvl")
    with pytest.raises(LayoutError, match="Slow gives no character offsets"):
        Preparer(source.processor, source.config, source.family, Slow())("the mug")
