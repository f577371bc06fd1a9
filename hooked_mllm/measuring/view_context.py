"""What a view can tell beside attention: the tokens' ids, what each position sees, the residual stream."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.errors import InputError
from hooked_mllm.layout import TokenLayout


@dataclass(frozen=True)
class ViewContext:
    """Facts of a forward pass that few metrics need; each is refused with a reason where it is not known.

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
            InputError: for inputs without ids.
        """
        if self.token_ids is None:
            raise InputError("This metric compares tokens, but the inputs came without `input_ids`.")
        return self.token_ids

    @property
    def layouts(self) -> Sequence[TokenLayout]:
        """One layout per sample.

        Raises:
            InputError: for a plain mapping of model inputs, which has none.
        """
        if self.token_layouts is None:
            raise InputError(
                "This metric must know which pixels each token sees, which a plain mapping of model inputs does not "
                "tell. Make samples with `model.prepare(question, images=...)`."
            )
        return self.token_layouts

    @property
    def residual(self) -> Sequence[Float[Tensor, "batch pos d_model"]]:
        """The residual stream entering each layer of the view.

        Raises:
            InputError: if the metric did not ask for it with `needs_residual = True`.
        """
        if self.residuals is None:
            raise InputError(
                "The residual stream was not kept: it is for metrics whose class says `needs_residual = True`."
            )
        return self.residuals
