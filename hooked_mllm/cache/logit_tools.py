"""From the residual stream to logits: the logit lens, and the contribution of each component to a logit."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.cache.residual import ResidualTools, Stack
from hooked_mllm.inputs.positions import Positions
from hooked_mllm.wiring.results import device_of

#: one token, or one for each sample: an id, a string that is one token, or ids
Tokens: TypeAlias = str | int | Sequence[int] | Int[Tensor, "..."]
#: without the batch axis where the cache is read without it
Logits: TypeAlias = Float[Tensor, "component *batch query vocab"]


class LogitTools(ResidualTools):
    """The methods of an ActivationCache that map residual streams to logits."""

    @overload
    def logit_lens(
        self,
        positions: Positions = "last",
        layer: int | None = None,
        incl_mid: bool = False,
        return_labels: Literal[False] = False,
    ) -> Logits: ...

    @overload
    def logit_lens(
        self,
        positions: Positions = "last",
        layer: int | None = None,
        incl_mid: bool = False,
        *,
        return_labels: Literal[True],
    ) -> tuple[Logits, list[str]]: ...

    def logit_lens(
        self,
        positions: Positions = "last",
        layer: int | None = None,
        incl_mid: bool = False,
        return_labels: bool = False,
    ) -> Logits | tuple[Logits, list[str]]:
        """The logits `[component batch query vocab]` of the residual stream entering each block, and of the final one.

        Args:
            positions: A token kind, a mask, indices, a slice or a region. The default is the last prompt position. In a
                batch of unequal samples, positions that a sample lacks are NaN.
            layer: The last block; None or -1: all, and the end.
            incl_mid: Include the residual stream between attention and MLP.
            return_labels: Also return the labels.

        Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
        """
        stack, labels = self.accumulated_resid(layer, incl_mid, return_labels=True)
        streams = self._at(self._batched(stack), positions)  # [component batch query d_model]
        model = self._model()
        device = device_of(model.lm_head)
        logits = torch.stack([model.lm_head(model.ln_final(stream.to(device))) for stream in streams])
        return self._labelled(logits.to(stack.device), labels, return_labels)

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: Tokens,
        incorrect_tokens: Tokens | None = None,
        positions: Positions = "last",
    ) -> Float[Tensor, "component *batch query"]:
        """The contribution of each component to a token's logit or a logit difference, `[component batch query]`.

        In float32; over a whole decomposition of the final residual stream they sum to the logit.

        Args:
            residual_stack: Components such as `decompose_resid` or `stack_head_results` returns.
            tokens: The token: an id, a string of one token, or one id for each sample.
            incorrect_tokens: Subtract this token's logit.
            positions: A token kind, a mask, indices, a slice or a region. The default is the last prompt position. In a
                batch of unequal samples, positions that a sample lacks are NaN.
        """
        model = self._model()
        residual_stack = self._batched(residual_stack)
        batch = residual_stack.shape[1]
        direction = model.unembed(tokens, batch)  # [batch d_model]
        if incorrect_tokens is not None:
            direction = direction - model.unembed(incorrect_tokens, batch)
        components = self._at(self._scaled(residual_stack.float()), positions)  # [component batch query d_model]
        attributions = torch.einsum("cbqd,bd->cbq", components, direction.to(components.device).float())
        return self._unbatched(attributions, 1)
