"""Model inputs: samples and their preparation, pictures and videos, and the one resolver of positions."""

from hooked_mllm.inputs.positions import Positions as Positions
from hooked_mllm.inputs.resolve import ModelInput as ModelInput
from hooked_mllm.inputs.resolve import ModelInputs as ModelInputs
from hooked_mllm.inputs.resolve import ResolvedInput as ResolvedInput
from hooked_mllm.inputs.sample import Sample as Sample
from hooked_mllm.inputs.sample import SampleBatch as SampleBatch
from hooked_mllm.inputs.video import Video as Video
from hooked_mllm.inputs.video import read_video as read_video
