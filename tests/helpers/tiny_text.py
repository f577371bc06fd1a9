"""A byte-level tokenizer trained in code, and chat templates shaped like those of the real checkpoints."""

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = {
    "qwen3_vl": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    },
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}
SPECIAL["qwen3_vl_moe"] = SPECIAL["qwen3_vl"]
COMMON = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

_WORDS = (
    "system user assistant You are a helpful assistant. What colour is the mug? What color is the star? "
    "Where is the dog in the picture? Describe the image. How many people are there in the video? "
    "the the the is is of of in a a seconds Frame1: Frame2: red green blue yellow the answer is"
)

_QWEN = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

_LLAVA = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + ' ' -}}
{%- for part in message.content if part.type == 'image' -%}{{- '<image>' -}}{%- endfor -%}
{%- for part in message.content if part.type == 'video' -%}{{- '<video>' -}}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{- '\n' + part.text -}}{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

_INTERNVL = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<IMG_CONTEXT>\n' -}}
{%- elif part.type == 'video' -%}{{- '<video>\n' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

TEMPLATE = {"qwen3_vl": _QWEN, "qwen3_vl_moe": _QWEN, "llava_onevision": _LLAVA, "internvl": _INTERNVL}


@lru_cache
def _trained(family: str) -> str:
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()  # as Qwen's: the ids of a decomposed "é" are those of the composed one
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*COMMON, *SPECIAL[family].values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([_WORDS], trainer)
    return bpe.to_str()


def no_processor(family: str) -> ValueError:
    """The error for a family that the helpers have no processor for."""
    return ValueError(f"no processor for family {family!r}: add it to real() and to SPECIAL in tiny_text.py")


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer: special tokens first, then the 256 bytes, then a few merges.

    Raises:
        ValueError: For a family that is not in `SPECIAL`.
    """
    if family not in SPECIAL:
        raise no_processor(family)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(family)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(SPECIAL[family]),
        padding_side="left",
        model_max_length=4096,
    )
