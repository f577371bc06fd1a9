"""Scores attention heads over samples: the loop, its checkpoint, and the view of attention that a metric reads."""

from hooked_mllm.measuring.attention_view import AttentionView as AttentionView
from hooked_mllm.measuring.measure import measure as measure
