"""Heads: which ones (`HeadSet`), and how much each one scores (`HeadScores`)."""

from hooked_mllm.heads.head_scores import HeadScores as HeadScores
from hooked_mllm.heads.head_set import HeadSet as HeadSet
