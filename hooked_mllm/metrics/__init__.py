"""Metrics of attention heads, as `torchmetrics.Metric`s; `metrics.functional` has the same maths as plain functions."""

from hooked_mllm.metrics import functional as functional
from hooked_mllm.metrics.attention_score import AttentionScore as AttentionScore
from hooked_mllm.metrics.base import AttentionMetric as AttentionMetric
from hooked_mllm.metrics.base import HeadMetric as HeadMetric
from hooked_mllm.metrics.key_token_coverage import CoverageCurve as CoverageCurve
from hooked_mllm.metrics.key_token_coverage import KeyTokenCoverage as KeyTokenCoverage
from hooked_mllm.metrics.key_token_ratio import KeyTokenRatio as KeyTokenRatio
from hooked_mllm.metrics.retrieval_attention_mass import RetrievalAttentionMass as RetrievalAttentionMass
from hooked_mllm.metrics.stability import Stability as Stability
from hooked_mllm.metrics.stability import stability as stability
from hooked_mllm.metrics.vision_mass import VisionMass as VisionMass
