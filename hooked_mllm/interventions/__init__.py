"""Interventions: what `model.intervene(...)` does to a model while it runs, undoes, and records."""

from hooked_mllm.interventions.ablation import HeadAblation as HeadAblation
from hooked_mllm.interventions.base import Intervention as Intervention
from hooked_mllm.interventions.knockout import AttentionKnockout as AttentionKnockout
from hooked_mllm.interventions.knockout import knockout_windows as knockout_windows
from hooked_mllm.interventions.patching import ActivationPatch as ActivationPatch
from hooked_mllm.interventions.patching import HeadPatch as HeadPatch
from hooked_mllm.interventions.reference import HeadReference as HeadReference
from hooked_mllm.interventions.steering import Steer as Steer
