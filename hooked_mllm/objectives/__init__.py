"""Objectives: what a causal experiment measures in the logits, one number for each sample."""

from hooked_mllm.objectives.answer import AnswerLogProb as AnswerLogProb
from hooked_mllm.objectives.answer import GreedyAccuracy as GreedyAccuracy
from hooked_mllm.objectives.base import BoundObjective as BoundObjective
from hooked_mllm.objectives.base import Objective as Objective
from hooked_mllm.objectives.divergence import KLDivergence as KLDivergence
from hooked_mllm.objectives.function import FunctionObjective as FunctionObjective
from hooked_mllm.objectives.function import as_objective as as_objective
from hooked_mllm.objectives.logit_difference import LogitDifference as LogitDifference
from hooked_mllm.objectives.logits import gather_logits as gather_logits
from hooked_mllm.objectives.logits import logits_at as logits_at
from hooked_mllm.objectives.values import objective_values as objective_values
