"""What a view provides besides attention: token ids, token layouts, the residual stream."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.errors import InputError
from hooked_mllm.layout import TokenLayout


@dataclass(frozen=True)
class ViewContext:
    """Facts of a forward pass that few metrics need; reading one that is not available raises with the reason.

    Args:
        token_ids: The input's ids, [batch pos].
        token_layouts: One layout per sample, padded as the batch is.
        residuals: The residual stream entering each layer of the view, [batch pos d_model].
    """

    token_ids: Int[Tensor, "batch pos"] | None = None
    token_layouts: Sequence[TokenLayout] | None = None
    residuals: Sequence[Float[Tensor, "batch pos d_model"]] | None = None

    @property
    def tokens(self) -> Int[Tensor, "batch pos"]:
        """The input's ids.

        Raises:
            InputError: For inputs without ids.
        """
        if self.token_ids is None:
            raise InputError("This metric compares tokens, but the inputs came without `input_ids`.")
        return self.token_ids

    @property
    def layouts(self) -> Sequence[TokenLayout]:
        """One layout per sample.

        Raises:
            InputError: For a plain mapping of model inputs, which has none.
        """
        if self.token_layouts is None:
            raise InputError(
                "This metric needs token layouts, which a plain mapping of model inputs does not have. Make samples "
                "with `model.prepare(question, images=...)`."
            )
        return self.token_layouts

    @property
    def residual(self) -> Sequence[Float[Tensor, "batch pos d_model"]]:
        """The residual stream entering each layer of the view.

        Raises:
            InputError: If the metric's class does not set `needs_residual = True`.
        """
        if self.residuals is None:
            raise InputError(
                "The residual stream was not kept: set `needs_residual = True` in the class of the metric."
            )
        return self.residuals
