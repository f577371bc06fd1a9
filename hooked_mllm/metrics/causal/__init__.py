"""Causal metrics: scores of heads and activations by the effect of interventions on an objective."""

from hooked_mllm.metrics.causal.ablation_curve import AblationCurve as AblationCurve
from hooked_mllm.metrics.causal.ablation_effect import AblationEffect as AblationEffect
from hooked_mllm.metrics.causal.ablation_result import AblationCurveResult as AblationCurveResult
from hooked_mllm.metrics.causal.attribution_patching import AttributionPatching as AttributionPatching
from hooked_mllm.metrics.causal.controls import Control as Control
from hooked_mllm.metrics.causal.controls import random_control as random_control
from hooked_mllm.metrics.causal.direct_logit import DirectLogitAttribution as DirectLogitAttribution
from hooked_mllm.metrics.causal.direct_logit import LogitDecomposition as LogitDecomposition
from hooked_mllm.metrics.causal.patching_effect import PatchingEffect as PatchingEffect
from hooked_mllm.metrics.causal.path_patching import PathPatching as PathPatching
from hooked_mllm.metrics.causal.table import CausalTable as CausalTable
