"""Corruptions: the counterpart of a sample in which the evidence is gone, and everything else as it was."""

from hooked_mllm.corruptions.base import Corruption as Corruption
from hooked_mllm.corruptions.other import OtherImage as OtherImage
from hooked_mllm.corruptions.other import OtherQuestion as OtherQuestion
from hooked_mllm.corruptions.pair import check_pair as check_pair
from hooked_mllm.corruptions.region import BlurRegion as BlurRegion
from hooked_mllm.corruptions.region import ImageNoise as ImageNoise
from hooked_mllm.corruptions.region import MeanRegion as MeanRegion
from hooked_mllm.corruptions.swap import SwapRegion as SwapRegion
