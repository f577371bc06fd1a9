"""What a view provides besides attention: token ids, token layouts, the residual stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.errors import InputError
from hooked_mllm.layout import TokenLayout

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class ViewContext:
    """Facts of a forward pass that few metrics need; reading one that is not available raises with the reason."""

    token_ids: Int[Tensor, "batch pos"] | None = None
    token_layouts: Sequence[TokenLayout] | None = None
    residuals: Sequence[Float[Tensor, "batch pos d_model"]] | None = None

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The input's ids."""
        return _required(self.token_ids, "This metric compares tokens, but the inputs came without `input_ids`.")

    @property
    def layouts(self) -> Sequence[TokenLayout]:
        """One layout per sample, padded as the batch is; a plain mapping of model inputs has none."""
        return _required(
            self.token_layouts,
            "This metric needs token layouts, which a plain mapping of model inputs does not have. Make samples with "
            "`model.prepare(question, images=...)`.",
        )

    @property
    def residual(self) -> Sequence[Float[Tensor, "batch pos d_model"]]:
        """The residual stream entering each layer of the view."""
        return _required(
            self.residuals, "The residual stream was not kept: set `needs_residual = True` in the class of the metric."
        )


def _required(value: Fact | None, reason: str) -> Fact:
    if value is None:
        raise InputError(reason)
    return value
