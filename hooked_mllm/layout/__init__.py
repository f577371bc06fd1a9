"""The token layout: what each position of the input is, and which pixels of the original each visual token sees."""

from hooked_mllm.layout.items import ImageMedia as ImageMedia
from hooked_mllm.layout.items import Media as Media
from hooked_mllm.layout.items import VideoMedia as VideoMedia
from hooked_mllm.layout.items import View as View
from hooked_mllm.layout.items import VisualItem as VisualItem
from hooked_mllm.layout.kinds import Kind as Kind
from hooked_mllm.layout.layout import TokenLayout as TokenLayout
from hooked_mllm.layout.regions import Box as Box
from hooked_mllm.layout.regions import Frames as Frames
from hooked_mllm.layout.regions import Mask as Mask
from hooked_mllm.layout.regions import Pages as Pages
from hooked_mllm.layout.regions import Region as Region
from hooked_mllm.layout.regions import Tube as Tube
