"""Look inside multimodal language models: name, read, edit and score everything between pixels and words."""

from typing import TYPE_CHECKING

import hooked_mllm.checks.typechecker  # noqa: F401  # before nnsight can be imported
from hooked_mllm.exports import MOVED, lazy_exports
from hooked_mllm.version import __version__ as __version__

if TYPE_CHECKING:
    from hooked_mllm import corruptions as corruptions
    from hooked_mllm import interventions as interventions
    from hooked_mllm import metrics as metrics
    from hooked_mllm import objectives as objectives
    from hooked_mllm import plots as plots
    from hooked_mllm import toys as toys
    from hooked_mllm.attention import routing as routing
    from hooked_mllm.attention.backends import AttentionBackend as AttentionBackend
    from hooked_mllm.attention.hybrid import HybridAttention as HybridAttention
    from hooked_mllm.attention.registered import register_hybrid_attention as register_hybrid_attention
    from hooked_mllm.cache import ActivationCache as ActivationCache
    from hooked_mllm.cache import GenerationCache as GenerationCache
    from hooked_mllm.errors import CacheFileError as CacheFileError
    from hooked_mllm.errors import HeadError as HeadError
    from hooked_mllm.errors import HookedMLLMError as HookedMLLMError
    from hooked_mllm.errors import HookNameError as HookNameError
    from hooked_mllm.errors import HookValueError as HookValueError
    from hooked_mllm.errors import InputError as InputError
    from hooked_mllm.errors import LayoutError as LayoutError
    from hooked_mllm.errors import NumericsError as NumericsError
    from hooked_mllm.errors import UnsupportedModelError as UnsupportedModelError
    from hooked_mllm.families.config import HookedConfig as HookedConfig
    from hooked_mllm.heads import HeadScores as HeadScores
    from hooked_mllm.heads import HeadSet as HeadSet
    from hooked_mllm.hooks import HookPoint as HookPoint
    from hooked_mllm.inputs.sample import Sample as Sample
    from hooked_mllm.inputs.sample import SampleBatch as SampleBatch
    from hooked_mllm.inputs.video import Video as Video
    from hooked_mllm.inputs.video import read_video as read_video
    from hooked_mllm.interventions import ActivationPatch as ActivationPatch
    from hooked_mllm.interventions import AttentionKnockout as AttentionKnockout
    from hooked_mllm.interventions import HeadAblation as HeadAblation
    from hooked_mllm.interventions import HeadPatch as HeadPatch
    from hooked_mllm.interventions import Intervention as Intervention
    from hooked_mllm.interventions import Steer as Steer
    from hooked_mllm.layout import Box as Box
    from hooked_mllm.layout import Frames as Frames
    from hooked_mllm.layout import Mask as Mask
    from hooked_mllm.layout import Pages as Pages
    from hooked_mllm.layout import TokenLayout as TokenLayout
    from hooked_mllm.layout import Tube as Tube
    from hooked_mllm.measuring.attention_view import AttentionView as AttentionView
    from hooked_mllm.metrics import HeadMetric as HeadMetric
    from hooked_mllm.model.hooked_mllm import HookedMLLM as HookedMLLM
else:
    __getattr__, __dir__, __all__ = lazy_exports(
        __name__,
        {
            "": "corruptions interventions metrics objectives plots toys",
            "attention": "routing",
            "attention.backends": "AttentionBackend",
            "attention.hybrid": "HybridAttention",
            "attention.registered": "register_hybrid_attention",
            "cache": "ActivationCache GenerationCache",
            "errors": "CacheFileError HeadError HookNameError HookValueError HookedMLLMError InputError LayoutError "
            "NumericsError UnsupportedModelError",
            "families.config": "HookedConfig",
            "heads": "HeadScores HeadSet",
            "hooks": "HookPoint",
            "inputs.sample": "Sample SampleBatch",
            "inputs.video": "Video read_video",
            "interventions": "ActivationPatch AttentionKnockout HeadAblation HeadPatch Intervention Steer",
            "layout": "Box Frames Mask Pages TokenLayout Tube",
            "measuring.attention_view": "AttentionView",
            "metrics": "HeadMetric",
            "model.hooked_mllm": "HookedMLLM",
        },
    )

MOVED["hooked_mllm.kernels.hybrid_attention"] = {"heads_from_gates": "hooked_mllm.heads"}
