"""Scores of attention heads that need no target region: from the questions alone, or from the model's own evidence."""

from hooked_mllm.metrics.annotation_free.evidence import EvidenceAgreement as EvidenceAgreement
from hooked_mllm.metrics.annotation_free.gradient_agreement import GradientAgreement as GradientAgreement
from hooked_mllm.metrics.annotation_free.occlusion_agreement import OcclusionAgreement as OcclusionAgreement
from hooked_mllm.metrics.annotation_free.paraphrase_consistency import ParaphraseConsistency as ParaphraseConsistency
from hooked_mllm.metrics.annotation_free.question_contrast import QuestionContrast as QuestionContrast
