"""What `HookedMLLM.measure` asks of a metric, and what it tells it about the model."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from hooked_mllm.measuring.attention_view import AttentionView


@dataclass(frozen=True)
class ModelInfo:
    """The facts of the model that is being measured: its shape, and what a result must name to be reproduced.

    Args:
        n_layers: Number of decoder layers.
        n_heads: Number of query heads per layer.
        n_kv_heads: Number of key-value heads per layer.
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
        """What a result keeps of this, as plain JSON-able values."""
        names = ("model", "revision", "family", "attention", "attention_settings", "dtype")
        known = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**known, "versions": dict(self.versions)} if self.versions else known


@runtime_checkable
class Metric(Protocol):
    """A metric of attention heads, as the measuring loop sees it.

    `setup` is called once before the first sample; `update` for every group of layers of every sample (or batch of
    samples), in the order of the layers, the last with `view.is_last`; `compute` at the end.
    """

    def setup(self, info: ModelInfo) -> None:
        """Learn the shape of the model and forget half-measured samples."""
        ...

    def update(self, *, view: "AttentionView") -> None:
        """Take in one group of layers."""
        ...

    def compute(self) -> Any:
        """The result over all samples taken in."""
        ...
