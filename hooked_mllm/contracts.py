"""What the engines are typed against, so that none of them imports `HookedMLLM`, which imports them.

`Model` and `Metric` are defined here; `Backend`, `Family`, `Region` and `HookFunction` in the rooms that use them.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, overload, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_mllm.attention.backends import AttentionBackend as AttentionBackend
from hooked_mllm.attention.backends import AttentionBackend as Backend
from hooked_mllm.families.base import Family as Family
from hooked_mllm.families.config import HookedConfig
from hooked_mllm.hooks.point import HookFunction as HookFunction
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.registry import HookList, HookRegistry
from hooked_mllm.inputs.images import Images
from hooked_mllm.inputs.resolve import ModelInput, ResolvedInput, RunInput
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.inputs.video import Videos
from hooked_mllm.layout import Region as Region
from hooked_mllm.wiring.model import Wiring

__all__ = [
    "Backend",
    "Family",
    "HookFunction",
    "Metric",
    "Model",
    "ModelInfo",
    "Phase",
    "Region",
    "ReturnType",
    "Tower",
]

if TYPE_CHECKING:
    #: what one forward pass returns
    ReturnType = Literal["logits", "loss", "both", "output"]
    #: one of the two stacks of transformer blocks
    Tower = Literal["text", "vision"]
    #: the steps in which an intervention acts: the prompt, generated tokens, or both
    Phase = Literal["prefill", "decode", "both"]
    #: `images=` and `videos=`: of one question one picture or several; of a list of questions an entry for each
    AnyImages = Images | Sequence[Images | None] | None
    AnyVideos = Videos | Sequence[Videos | None] | None
else:  # at run time wider, so that another value reaches the check whose error lists the choices
    ReturnType = Tower = Phase = str
    AnyImages = AnyVideos = object


@dataclass(frozen=True)
class ModelInfo:
    """Facts of the model that is measured: its shape, and what a result states so that it can be reproduced.

    Args:
        n_layers: Decoder layers.
        n_heads: Query heads per layer.
        n_kv_heads: Key-value heads per layer.
        model: Name or path of the checkpoint.
        revision: Its revision.
        family: Name of the model family.
        attention: Attention implementation of the forward pass.
        attention_settings: The settings of an attention backend, as JSON-able values.
        dtype: Dtype of the weights.
        versions: Library versions by name.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    model: str | None = None
    revision: str | None = None
    family: str | None = None
    attention: str | None = None
    attention_settings: dict[str, Any] | None = None
    dtype: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def provenance(self) -> dict[str, Any]:
        """The part that a result keeps, as values that JSON can hold."""
        names = ("model", "revision", "family", "attention", "attention_settings", "dtype")
        known = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**known, "versions": dict(self.versions)} if self.versions else known


Result_co = TypeVar("Result_co", covariant=True)
View_contra = TypeVar("View_contra", contravariant=True)


@runtime_checkable
class Metric(Protocol[View_contra, Result_co]):
    """A metric of attention heads, as the measuring loop uses it.

    `setup` is called once before the first sample; `update` with an `AttentionView` of every group of layers of every
    sample (or batch of samples), in the order of the layers, the last with `view.is_last`; `compute` at the end.
    """

    def setup(self, info: ModelInfo) -> None:
        """Read the shape of the model and drop samples that were measured in part."""
        ...

    def update(self, *, view: View_contra) -> None:
        """Add one group of layers."""
        ...

    def compute(self) -> Result_co:
        """The result over all samples added."""
        ...


@runtime_checkable
class Model(Protocol):
    """A wrapped model, as engines use it; `HookedMLLM` is one, and documents each of these."""

    hf_model: Any
    processor: Any
    cfg: HookedConfig
    family: Family
    registry: HookRegistry
    wiring: Wiring

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def info(self) -> ModelInfo: ...

    @property
    def hook_dict(self) -> dict[str, HookPoint]: ...

    @property
    def ln_final(self) -> nn.Module: ...

    @property
    def lm_head(self) -> nn.Module: ...

    def output_projection(self, layer: int) -> nn.Module: ...

    def unembed(self, tokens: Any, batch: int) -> Float[Tensor, "batch d_model"]: ...

    @overload
    def prepare(self, question: str, images: AnyImages = None, videos: AnyVideos = None, **options: Any) -> Sample: ...

    @overload
    def prepare(
        self, question: list[str] | tuple[str, ...], images: AnyImages = None, videos: AnyVideos = None, **options: Any
    ) -> SampleBatch: ...

    def prepare(
        self, question: str | Sequence[str], images: AnyImages = None, videos: AnyVideos = None, **options: Any
    ) -> Sample | SampleBatch: ...

    def resolve(self, inputs: RunInput) -> ResolvedInput: ...

    def __call__(self, inputs: RunInput | None = None, **kwargs: Any) -> Any: ...

    def run(
        self,
        inputs: ResolvedInput,
        return_type: ReturnType | None = "logits",
        stop_at_layer: int | None = None,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> Any: ...

    def run_trunk(self, inputs: ResolvedInput, prompt_length: int | None = None, **kwargs: Any) -> None: ...

    def generate(self, inputs: RunInput | None = None, **kwargs: Any) -> Tensor: ...

    def run_generate(self, inputs: ResolvedInput, **kwargs: Any) -> Any: ...

    def measure(
        self,
        samples: ModelInput | Iterable[ModelInput],
        metrics: Any,
        *,
        checkpoint: str | PathLike[str] | None = None,
        save_every: int = 20,
        progress: bool = True,
    ) -> Any: ...

    def hooks(
        self, fwd_hooks: HookList = (), bwd_hooks: HookList = (), reset_hooks_end: bool = True
    ) -> AbstractContextManager[None]: ...

    def intervene(self, *interventions: Any) -> AbstractContextManager[list[dict[str, Any]]]: ...

    def attention(
        self, implementation: str | AttentionBackend, tower: Tower = "text"
    ) -> AbstractContextManager[None]: ...
