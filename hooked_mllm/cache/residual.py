"""The residual stream taken apart: components, logit lens, per-head results, and their attribution to logits.

A multimodal stream has terms that a text model lacks: the projected image at visual positions, and for Qwen3-VL the
features that DeepStack adds after the first blocks. They are components here, so that sums are exact everywhere.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_mllm.cache.lazy import value_of
from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookNameError, HookValueError, InputError
from hooked_mllm.wiring.norms import centred

if TYPE_CHECKING:
    from hooked_mllm.cache.activation_cache import Positions

#: without the batch axis where the cache is read without it
Stack = Float[Tensor, "component *batch pos d_model"]


class ResidualTools:
    """The residual-stream methods of an ActivationCache."""

    model: Model
    has_batch_dim: bool

    def _need(self, *key: Any) -> Tensor:
        try:
            return value_of(self.entry(key if len(key) > 1 else key[0]))  # type: ignore[attr-defined]
        except HookNameError as error:
            raise HookNameError(
                f"This needs {key!r} in the cache. {error} Run with `names_filter=None`, or with a filter that keeps "
                "it."
            ) from error

    def _model(self) -> Any:
        if self.model is None:
            raise InputError(
                "This needs the model's weights: load the cache with `ActivationCache.load(path, model=model)`."
            )
        return self.model

    def _layer(self, layer: int | None) -> int:
        count = self._n_layers["text"]  # type: ignore[attr-defined]
        if layer is None:
            return count
        if not -count <= layer <= count:
            raise HookNameError(f"Layer {layer} is out of range: the model has {count} blocks.")
        return layer + count if layer < 0 else layer

    def _visual(self, like: Tensor) -> Tensor:
        mask = None if self._masks is None else self._masks("visual")  # type: ignore[attr-defined]
        if mask is None:
            raise InputError("These inputs do not say which positions are visual; use `model.prepare`.")
        if mask.shape[1] != like.shape[1]:
            raise HookValueError(
                f"The cache keeps {like.shape[1]} of {mask.shape[1]} positions: a decomposition needs all of them "
                "(run without `pos_slice`)."
            )
        return mask.to(like.device)[..., None]

    def decompose_resid(
        self,
        layer: int | None = None,
        mode: str = "all",
        incl_embeds: bool = True,
        apply_ln: bool = False,
        return_labels: bool = False,
    ) -> Any:
        r"""The terms whose sum is the residual stream entering a block (or the final norm).

        $x_l = e + v + \sum_{i<l} (a_i + m_i + s_i)$ with the text embedding e (zero at visual positions), the projected
        image v (zero elsewhere), attention and MLP outputs a and m, and DeepStack's features s where the model has
        them.

        Args:
            layer: The block whose input is taken apart; None: the input of the final norm.
            mode: "all", or only attention's or the MLPs' terms.
            incl_embeds: Include e and v.
            apply_ln: Scale the terms as the final norm scales their sum.
            return_labels: Also give the labels.

        Returns:
            `[component batch pos d_model]`, with labels such as "embed", "visual", "0_attn_out", "0_mlp_out",
            "0_deepstack".

        Raises:
            HookNameError: when the cache lacks a term.
        """
        if mode not in ("all", "attn", "mlp"):
            raise HookValueError(f"mode must be 'all', 'attn' or 'mlp'; got {mode!r}.")
        stop = self._layer(layer)
        parts: list[Tensor] = []
        labels: list[str] = []
        if incl_embeds:
            embed = self._need("embed")
            visual = self._visual(embed)
            parts += [embed.masked_fill(visual, 0), embed.masked_fill(~visual, 0)]
            labels += ["embed", "visual"]
        for l in range(stop):
            for name in [f"{kind}_out" for kind in ("attn", "mlp") if mode in ("all", kind)]:
                parts.append(self._need(name, l))
                labels.append(f"{l}_{name}")
            if mode == "all" and l < self._n_deepstack():
                parts.append(self._deepstack(l, parts[-1]))
                labels.append(f"{l}_deepstack")
        if not parts:
            raise HookValueError("No terms: below layer 0 there is nothing but the embeddings (`incl_embeds`).")
        stack = torch.stack(parts)
        return self._given(self._scaled(stack, layer) if apply_ln else stack, labels, return_labels)

    def _given(self, stack: Tensor, labels: list[str], return_labels: bool) -> Any:
        stack = self._unbatched(stack, 1)  # type: ignore[attr-defined]
        return (stack, labels) if return_labels else stack

    def _n_deepstack(self) -> int:
        return self._model().cfg.n_deepstack

    def _deepstack(self, layer: int, like: Tensor) -> Tensor:
        if ("deepstack", layer) in self:  # type: ignore[operator]
            return self._need("deepstack", layer)
        if self._masks is not None and not bool(self._masks("visual").any()):  # type: ignore[attr-defined]
            return torch.zeros_like(like)  # no image, nothing was added
        return self._need("deepstack", layer)

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """The residual stream at the entrance of every block up to `layer`, and at its end.

        Args:
            layer: The last block whose input is given; None: all, and the input of the final norm.
            incl_mid: Also give the stream between attention and MLP.
            apply_ln: Normalise each as the final norm would, with its own scale.
            return_labels: Also give the labels ("0_pre", "0_mid", ..., "final_post").

        Returns:
            `[component batch pos d_model]`.
        """
        count = self._n_layers["text"]  # type: ignore[attr-defined]
        stop = self._layer(layer)
        parts: list[Tensor] = []
        labels: list[str] = []
        for l in range(min(stop, count - 1) + 1):
            parts.append(self._need("resid_pre", l))
            labels.append(f"{l}_pre")
            if incl_mid and l < stop:
                parts.append(self._need("resid_mid", l))
                labels.append(f"{l}_mid")
        if stop == count:
            final = self._need("resid_post", count - 1)
            parts.append(final + self._deepstack(count - 1, final) if self._n_deepstack() == count else final)
            labels.append("final_post")
        stack = torch.stack(parts)
        if apply_ln:
            norm = self._model().ln_final
            stack = torch.stack([norm(part.to(norm.weight.device)).to(part.device) for part in stack])
        return self._given(stack, labels, return_labels)

    def stack_activation(self, name: str, layer: int | None = None, part: str | None = None) -> Tensor:
        """One kind of activation of every block below `layer`, stacked along a new first axis."""
        key = (part,) if part else ()
        parts = [self._need(name, l, *key) for l in range(self._layer(layer))]
        if not parts:
            raise HookValueError("There is no block below layer 0; give `layer` at least 1, or None for all.")
        return self._unbatched(torch.stack(parts), 1)  # type: ignore[attr-defined]

    def stack_head_results(
        self,
        layer: int | None = None,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """What every head of every block below `layer` writes to the residual stream.

        Args:
            layer: Heads of the blocks below it; None: all.
            incl_remainder: Add a last term that makes the sum the residual stream.
            apply_ln: Scale the terms as the final norm scales their sum.
            return_labels: Also give the labels ("L0H3").

        Returns:
            `[component batch pos d_model]`, heads in the order of layer and head.
        """
        stop = self._layer(layer)
        parts: list[Tensor] = []
        labels: list[str] = []
        for l in range(stop):
            result = self._need("result", l) if ("result", l) in self else self._results(l)  # type: ignore[operator]
            parts += list(result.unbind(-2))
            labels += [f"L{l}H{h}" for h in range(result.shape[-2])]
        if incl_remainder:
            whole = self._stream(stop)
            parts.append(whole - torch.stack(parts).sum(0) if parts else whole)
            labels.append("remainder")
        if not parts:
            raise HookValueError("There are no heads below layer 0; give `layer` at least 1, or None for all.")
        stack = torch.stack(parts)
        return self._given(self._scaled(stack, layer) if apply_ln else stack, labels, return_labels)

    def _results(self, layer: int) -> Tensor:
        from hooked_mllm.wiring.blocks import head_results

        z = self._need("z", layer)
        return head_results(z, self._model().output_projection(layer), z.device)

    def _stream(self, layer: int) -> Tensor:
        count = self._n_layers["text"]  # type: ignore[attr-defined]
        if layer < count:
            return self._need("resid_pre", layer)
        final = self._need("resid_post", count - 1)
        return final + self._deepstack(count - 1, final) if self._n_deepstack() == count else final

    def apply_ln_to_stack(self, stack: Stack, layer: int | None = None) -> Stack:
        """Scale the terms of a sum as the final norm scales the sum: linear, so attributions add up.

        Args:
            stack: `[component batch pos d_model]`.
            layer: The block whose input the terms sum to; None: the input of the final norm.
        """
        return self._unbatched(self._scaled(self._batched(stack), layer), 1)  # type: ignore[attr-defined]

    def _batched(self, stack: Tensor) -> Tensor:
        return stack if self.has_batch_dim or stack.dim() == 4 else stack.unsqueeze(1)

    def _scaled(self, stack: Tensor, layer: int | None = None) -> Tensor:
        norm: nn.Module = self._model().ln_final
        stop, count = self._layer(layer), self._n_layers["text"]  # type: ignore[attr-defined]
        if stop == count and "ln_final.hook_scale" in self:  # type: ignore[operator]
            scale = self._need("ln_final.hook_scale")
        else:
            stream = centred(norm, self._stream(stop))
            scale = torch.sqrt(stream.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)  # type: ignore[operator]
        weight: Tensor = norm.weight  # type: ignore[assignment]
        return (stack.float() / scale * weight.to(stack.device).float()).to(stack.dtype)

    def logit_lens(
        self,
        positions: "Positions" = "last",
        layer: int | None = None,
        incl_mid: bool = False,
        return_labels: bool = False,
    ) -> Any:
        """What the model would say if it stopped at each block: the final norm and unembedding on the residual stream.

        Args:
            positions: Where; a token kind, a mask, indices, a slice. The default is the last prompt position.
            layer: The last block; None: all, and the end.
            incl_mid: Also between attention and MLP.
            return_labels: Also give the labels.

        Returns:
            Logits `[component batch query vocab]`. The last of them are the model's own logits.

        Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
        """
        stack, labels = self.accumulated_resid(layer, incl_mid, return_labels=True)
        stack = self._batched(stack)
        index = self.positions(positions, stack.shape[1], stack.shape[2])  # type: ignore[attr-defined]
        from hooked_mllm.cache.capture import take

        model = self._model()
        rows = torch.stack([take(part, index.to(part.device), dim=1) for part in stack])
        device = model.lm_head.weight.device
        logits = torch.stack([model.lm_head(model.ln_final(row.to(device))) for row in rows]).to(stack.device)
        return self._given(logits, labels, return_labels)

    def logit_attrs(
        self,
        residual_stack: Stack,
        tokens: str | int | Sequence[int] | Int[Tensor, "..."],
        incorrect_tokens: str | int | Sequence[int] | Int[Tensor, "..."] | None = None,
        positions: "Positions" = "last",
    ) -> Float[Tensor, "component *batch query"]:
        """How much each term of the final residual stream adds to a token's logit, or to a logit difference.

        Args:
            residual_stack: Terms, as `decompose_resid` or `stack_head_results` give them, of the final stream.
            tokens: The token: an id, a string of one token, or one id a sample.
            incorrect_tokens: Subtract this token's logit.
            positions: Where; the default is the last prompt position.

        Returns:
            `[component batch query]`, float32. Over a whole decomposition they sum to the logit.
        """
        from hooked_mllm.cache.capture import take

        model = self._model()
        residual_stack = self._batched(residual_stack)
        batch = residual_stack.shape[1]
        direction = model.unembed(tokens, batch)
        if incorrect_tokens is not None:
            direction = direction - model.unembed(incorrect_tokens, batch)
        scaled = self._scaled(residual_stack.float())
        index = self.positions(positions, batch, residual_stack.shape[2])  # type: ignore[attr-defined]
        rows = torch.stack([take(part, index.to(part.device), dim=1) for part in scaled])
        attributions = torch.einsum("cbqd,bd->cbq", rows, direction.to(rows.device).float())
        return self._unbatched(attributions, 1)  # type: ignore[attr-defined]
