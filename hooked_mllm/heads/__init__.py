"""Heads: which ones (`HeadSet`), how much each one scores (`HeadScores`, `SampleScores`), and statistics."""

from hooked_mllm.display.head_names import head_name as head_name
from hooked_mllm.display.head_names import head_names as head_names
from hooked_mllm.heads.concentration import rho_half as rho_half
from hooked_mllm.heads.gates import heads_from_gates as heads_from_gates
from hooked_mllm.heads.head_scores import HeadScores as HeadScores
from hooked_mllm.heads.head_set import HeadSet as HeadSet
from hooked_mllm.heads.parsing import HeadsLike as HeadsLike
from hooked_mllm.heads.parsing import heads_in_layer as heads_in_layer
from hooked_mllm.heads.parsing import parse_heads as parse_heads
from hooked_mllm.heads.sample_scores import SampleScores as SampleScores
from hooked_mllm.heads.summaries import Interval as Interval
from hooked_mllm.heads.summaries import Overlap as Overlap
from hooked_mllm.heads.summaries import bootstrap as bootstrap
from hooked_mllm.heads.summaries import overlap_across_seeds as overlap_across_seeds
from hooked_mllm.heads.summaries import pairwise_overlap as pairwise_overlap
