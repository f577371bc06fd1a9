"""Metrics of attention heads, as `torchmetrics.Metric`s; `metrics.functional` has the same maths as plain functions."""

from hooked_mllm.metrics import functional as functional
from hooked_mllm.metrics.attention_score import AttentionScore as AttentionScore
from hooked_mllm.metrics.base import AttentionMetric as AttentionMetric
from hooked_mllm.metrics.base import HeadMetric as HeadMetric
from hooked_mllm.metrics.key_token_coverage import CoverageCurve as CoverageCurve
from hooked_mllm.metrics.key_token_coverage import KeyTokenCoverage as KeyTokenCoverage
from hooked_mllm.metrics.key_token_ratio import KeyTokenRatio as KeyTokenRatio
from hooked_mllm.metrics.literature import GazeHeads as GazeHeads
from hooked_mllm.metrics.literature import LocalizationHeads as LocalizationHeads
from hooked_mllm.metrics.literature import MMRetHeads as MMRetHeads
from hooked_mllm.metrics.literature import NullQuery as NullQuery
from hooked_mllm.metrics.literature import OCRHeads as OCRHeads
from hooked_mllm.metrics.literature import QRHead as QRHead
from hooked_mllm.metrics.literature import RetrievalHeads as RetrievalHeads
from hooked_mllm.metrics.literature import SparseMMHeads as SparseMMHeads
from hooked_mllm.metrics.literature import VisualNonSinkRatio as VisualNonSinkRatio
from hooked_mllm.metrics.literature import VisualRetrievalHeads as VisualRetrievalHeads
from hooked_mllm.metrics.literature import VisualSinkShare as VisualSinkShare
from hooked_mllm.metrics.retrieval_attention_mass import RetrievalAttentionMass as RetrievalAttentionMass
from hooked_mllm.metrics.stability import Stability as Stability
from hooked_mllm.metrics.stability import stability as stability
from hooked_mllm.metrics.vision_mass import VisionMass as VisionMass
