"""One file per model family: module names and sizes, what differs in the hook points, and how pixels become tokens."""

from hooked_mllm.families.base import Family as Family
from hooked_mllm.families.internvl import InternVL as InternVL
from hooked_mllm.families.llava_onevision import LlavaOnevision as LlavaOnevision
from hooked_mllm.families.parts import BlockParts as BlockParts
from hooked_mllm.families.parts import TowerParts as TowerParts
from hooked_mllm.families.parts import TowerSizes as TowerSizes
from hooked_mllm.families.qwen3_vl import Qwen3VL as Qwen3VL
from hooked_mllm.families.registry import FAMILIES as FAMILIES
from hooked_mllm.families.registry import family_of as family_of
from hooked_mllm.families.registry import register as register
