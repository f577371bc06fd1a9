"""The words of the synthetic tasks, and their word-level tokenizer."""

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

SHAPES = (
    "circle", "square", "triangle", "diamond", "plus", "saltire", "star", "ring", "frame", "heart",
    "moon", "arrow", "hourglass", "bowtie", "pie", "bar", "pillar", "tee", "stairs", "chevron",
)  # fmt: skip
COLORS = {
    "red": (225, 40, 40), "green": (40, 165, 60), "blue": (45, 80, 225), "yellow": (240, 220, 50),
    "purple": (150, 50, 180), "cyan": (60, 210, 220), "black": (15, 15, 15), "white": (250, 250, 250),
}  # fmt: skip
TEMPLATES = (
    "What color is the {}?",
    "Which color does the {} have?",
    "Tell me the color of the {}.",
    "The {} is drawn in which color?",
)
FILLER = (
    "river", "table", "music", "window", "paper", "garden", "morning", "bridge", "letter", "winter",
    "coffee", "market", "train", "summer", "village", "mirror", "kitchen", "forest", "story", "number",
    "cloud", "street", "island", "basket", "engine", "pencil", "valley", "button", "candle", "harbor",
)  # fmt: skip

FAMILIES = ("qwen3_vl", "llava_onevision", "internvl")
IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
PAD_TOKEN, TURN_START, TURN_END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unk|>"
SPECIAL_TOKENS = (
    PAD_TOKEN, TURN_START, TURN_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", VISION_START, VISION_END, "<|vision_pad|>",
    IMAGE_TOKEN, VIDEO_TOKEN, UNKNOWN,
)  # fmt: skip
#: attributes of the tokenizer that the processor of the family reads
VISUAL_TOKENS = {
    "qwen3_vl": {
        "image_token": IMAGE_TOKEN,
        "video_token": VIDEO_TOKEN,
        "vision_start_token": VISION_START,
        "vision_end_token": VISION_END,
    },
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}


def special_tokens(family: str = "qwen3_vl") -> tuple[str, ...]:
    """The special tokens of a family's tokenizer, in the order of their ids."""
    if family == "qwen3_vl":
        return SPECIAL_TOKENS
    return (PAD_TOKEN, TURN_START, TURN_END, *VISUAL_TOKENS[family].values(), UNKNOWN)


def words() -> list[str]:
    """Every plain word of the vocabulary, each once, in a fixed order."""
    questions = " ".join(TEMPLATES).lower().replace("?", " ?").replace(".", " .")
    # digits, brackets and "seconds" are for the processor's video time stamps, "<0.5 seconds>"
    marks = ["system", "user", "assistant", "<", ">", "seconds", ",", ":", "!", *"0123456789"]
    question_words = [word for word in questions.split() if word != "{}"]
    return list(dict.fromkeys([*marks, *question_words, *COLORS, *SHAPES, *FILLER]))


def vocabulary(family: str = "qwen3_vl") -> list[str]:
    """Every token of a family's tokenizer, in the order of their ids."""
    return [*special_tokens(family), *words()]


def build_tokenizer(family: str = "qwen3_vl") -> PreTrainedTokenizerFast:
    """The toy's tokenizer: lower-cased words and single digits; a word outside the vocabulary becomes `<|unk|>`.

    Examples:
        >>> build_tokenizer().tokenize("What color is the star?")
        ['what', 'color', 'is', 'the', 'star', '?']
    """
    ids = {token: i for i, token in enumerate(vocabulary(family))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.add_special_tokens(list(special_tokens(family)))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=dict(VISUAL_TOKENS[family]),
    )
