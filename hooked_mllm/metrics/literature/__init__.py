"""Scores of the literature, each with its formula, its source, and what its released code does differently."""

from hooked_mllm.metrics.literature.calibrated import MMRetHeads as MMRetHeads
from hooked_mllm.metrics.literature.calibrated import QRHead as QRHead
from hooked_mllm.metrics.literature.grid import spatial_entropy as spatial_entropy
from hooked_mllm.metrics.literature.grid import token_grid as token_grid
from hooked_mllm.metrics.literature.localization_heads import LocalizationHeads as LocalizationHeads
from hooked_mllm.metrics.literature.null_query import NullQuery as NullQuery
from hooked_mllm.metrics.literature.presets import GazeHeads as GazeHeads
from hooked_mllm.metrics.literature.presets import OCRHeads as OCRHeads
from hooked_mllm.metrics.literature.presets import VisualRetrievalHeads as VisualRetrievalHeads
from hooked_mllm.metrics.literature.retrieval_heads import RetrievalHeads as RetrievalHeads
from hooked_mllm.metrics.literature.retrieval_heads import SparseMMHeads as SparseMMHeads
from hooked_mllm.metrics.literature.visual_sinks import PUBLISHED_DIMS as PUBLISHED_DIMS
from hooked_mllm.metrics.literature.visual_sinks import VisualNonSinkRatio as VisualNonSinkRatio
from hooked_mllm.metrics.literature.visual_sinks import VisualSinkShare as VisualSinkShare
from hooked_mllm.metrics.literature.visual_sinks import massive_dims as massive_dims
