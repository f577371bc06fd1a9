"""What a model is called with: samples and how they are prepared, media, and which positions a name selects."""

from hooked_mllm.inputs.resolve import ModelInput as ModelInput
from hooked_mllm.inputs.resolve import ResolvedInput as ResolvedInput
from hooked_mllm.inputs.sample import Sample as Sample
from hooked_mllm.inputs.sample import SampleBatch as SampleBatch
from hooked_mllm.inputs.video import Video as Video
from hooked_mllm.inputs.video import read_video as read_video
