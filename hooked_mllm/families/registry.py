"""The supported families, by `config.model_type`."""

from hooked_mllm.errors import UnsupportedModelError
from hooked_mllm.families.base import Family
from hooked_mllm.families.internvl import InternVL
from hooked_mllm.families.llava_onevision import LlavaOnevision
from hooked_mllm.families.qwen3_vl import Qwen3VL

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Register a family under each of its `model_types`, and return it.

    Examples:
        >>> register(Qwen3VL()).name
        'qwen3_vl'
    """
    for model_type in family.model_types:
        FAMILIES[model_type] = family
    return family


for _family in (Qwen3VL(), LlavaOnevision(), InternVL()):
    register(_family)


def family_of(config: object) -> Family:
    """The family of a transformers configuration, or of any object with a `model_type`.

    Raises:
        UnsupportedModelError: If no family has that `model_type`.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type == "internvl_chat":
        raise UnsupportedModelError(
            "This is InternVL's own checkpoint layout (model_type 'internvl_chat'), which needs remote code. Use the "
            "native transformers checkpoint, InternVLForConditionalGeneration: the repositories whose name ends in "
            "'-HF', such as OpenGVLab/InternVL3_5-8B-HF."
        )
    known = ", ".join(f"{f.model_classes[0]} ({', '.join(f.model_types)})" for f in dict.fromkeys(FAMILIES.values()))
    raise UnsupportedModelError(f"No family for model_type {model_type!r}. Supported: {known}.")
