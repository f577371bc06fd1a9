"""Decompositions of the residual stream: components, head results, and the residual stream of every block.

The projected image and Qwen3-VL's DeepStack features are components too, so that all sum to the residual stream.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.cache.lazy import Entry, take, value_of
from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookNameError, HookValueError, InputError
from hooked_mllm.heads import head_name
from hooked_mllm.inputs.positions import Positions, TokenKind
from hooked_mllm.wiring.norms import gain_and_bias, scale_of
from hooked_mllm.wiring.results import device_of, head_results

#: without the batch axis where the cache is read without it
Stack: TypeAlias = Float[Tensor, "component *batch pos d_model"]
Labelled: TypeAlias = tuple[Stack, list[str]]

if TYPE_CHECKING:
    Mode = Literal["all", "attn", "mlp"]
else:  # at run time a plain string, so that another one reaches the check whose error lists the choices
    Mode = str


class ResidualTools(Mapping[str, Tensor]):
    """The residual-stream methods of an ActivationCache."""

    model: Model | None
    has_batch_dim: bool
    entry: Callable[[object], Entry]
    positions: Callable[[Positions, int, int | None], Int[Tensor, "batch n"]]
    _n_layers: dict[str, int]
    row_mask: Callable[[TokenKind, int], Bool[Tensor, "batch pos"] | None]
    _unbatched: Callable[..., Tensor]

    # -- decompositions ------------------------------------------------------------------------------------------------

    @overload
    def decompose_resid(
        self,
        layer: int | None = None,
        mode: Mode = "all",
        incl_embeds: bool = True,
        apply_ln: bool = False,
        return_labels: Literal[False] = False,
    ) -> Stack: ...

    @overload
    def decompose_resid(
        self,
        layer: int | None = None,
        mode: Mode = "all",
        incl_embeds: bool = True,
        apply_ln: bool = False,
        *,
        return_labels: Literal[True],
    ) -> Labelled: ...

    def decompose_resid(
        self,
        layer: int | None = None,
        mode: Mode = "all",
        incl_embeds: bool = True,
        apply_ln: bool = False,
        return_labels: bool = False,
    ) -> Stack | Labelled:
        r"""The components whose sum is the residual stream entering a block (or the final norm).

        $x_l = e + v + \sum_{i<l} (a_i + m_i + s_i)$ `[component batch pos d_model]` with the text embedding e (zero at
        visual positions), the projected image v (zero elsewhere), attention and MLP outputs a and m, and DeepStack's
        features s where the model has them.

        Args:
            layer: The block whose input is decomposed; None or -1: the input of the final norm.
            mode: "all", or only the components of attention ("attn") or of the MLPs ("mlp").
            incl_embeds: Include e and v.
            apply_ln: Scale the components as the norm of that input scales their sum (see `apply_ln_to_stack`).
            return_labels: Also return the labels, such as "embed", "visual", "0_attn_out", "0_mlp_out", "0_deepstack".

        Raises:
            HookNameError: When the cache does not contain a component.
        """
        if mode not in ("all", "attn", "mlp"):
            raise HookValueError(f"mode must be 'all', 'attn' or 'mlp'; got {mode!r}.")
        stop = self._layer(layer)
        components: list[Tensor] = []
        labels: list[str] = []
        if incl_embeds:
            embed = self._need("embed")
            visual = self._visual(embed)
            components += [embed.masked_fill(visual, 0), embed.masked_fill(~visual, 0)]
            labels += ["embed", "visual"]
        for l in range(stop):
            for name in [f"{kind}_out" for kind in ("attn", "mlp") if mode in ("all", kind)]:
                components.append(self._need(name, l))
                labels.append(f"{l}_{name}")
            if mode == "all" and l < self._model().cfg.n_deepstack:
                components.append(self._deepstack(l, components[-1]))
                labels.append(f"{l}_deepstack")
        if not components:
            raise HookValueError("No components: below layer 0 there are only the embeddings (`incl_embeds`).")
        stack = torch.stack(components)  # [component batch pos d_model]
        return self._labelled(self._scaled(stack, layer) if apply_ln else stack, labels, return_labels)

    @overload
    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        return_labels: Literal[False] = False,
    ) -> Stack: ...

    @overload
    def accumulated_resid(
        self, layer: int | None = None, incl_mid: bool = False, apply_ln: bool = False, *, return_labels: Literal[True]
    ) -> Labelled: ...

    def accumulated_resid(
        self, layer: int | None = None, incl_mid: bool = False, apply_ln: bool = False, return_labels: bool = False
    ) -> Stack | Labelled:
        """The residual stream entering every block up to `layer`, and at the end: `[component batch pos d_model]`.

        Args:
            layer: The last block whose input is returned; None or -1: all, and the input of the final norm.
            incl_mid: Include the residual stream between attention and MLP.
            apply_ln: Apply the final norm to each, with its own scale. Up to a block, as in TransformerLens: scale each
                as that block's first norm scales its input.
            return_labels: Also return the labels ("0_pre", "0_mid", ..., "final_post").
        """
        count = self._n_layers["text"]
        stop = self._layer(layer)
        streams: list[Tensor] = []
        labels: list[str] = []
        for l in range(min(stop, count - 1) + 1):
            streams.append(self._need("resid_pre", l))
            labels.append(f"{l}_pre")
            if incl_mid and l < stop:
                streams.append(self._need("resid_mid", l))
                labels.append(f"{l}_mid")
        if stop == count:
            streams.append(self._stream(count))
            labels.append("final_post")
        if apply_ln and stop == count:
            norm = self._model().ln_final
            device = device_of(norm)
            streams = [norm(stream.to(device)).to(stream.device) for stream in streams]
        stack = torch.stack(streams)  # [component batch pos d_model]
        return self._labelled(self._scaled(stack, stop) if apply_ln and stop < count else stack, labels, return_labels)

    def stack_activation(self, name: str, layer: int | None = None, part: str | None = None) -> Tensor:
        """One kind of activation of every block below `layer` (None or -1: all), stacked along a new first axis."""
        activations = [self._need(name, l, *((part,) if part else ())) for l in range(self._layer(layer))]
        if not activations:
            raise HookValueError("There is no block below layer 0; give `layer` at least 1, or None for all.")
        return self._unbatched(torch.stack(activations), 1)

    @overload
    def stack_head_results(
        self,
        layer: int | None = None,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        return_labels: Literal[False] = False,
    ) -> Stack: ...

    @overload
    def stack_head_results(
        self,
        layer: int | None = None,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        *,
        return_labels: Literal[True],
    ) -> Labelled: ...

    def stack_head_results(
        self,
        layer: int | None = None,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        return_labels: bool = False,
    ) -> Stack | Labelled:
        """The output `[component batch pos d_model]` of every head below `layer` to the residual stream.

        Args:
            layer: Heads of the blocks below it; None or -1: all.
            incl_remainder: Add a last component, so that the sum is the residual stream.
            apply_ln: Scale the components as the norm of that stream scales it (see `apply_ln_to_stack`).
            return_labels: Also return the labels ("L0H3").
        """
        stop = self._layer(layer)
        results: list[Tensor] = []
        labels: list[str] = []
        for l in range(stop):
            if ("result", l) in self:
                result = self._need("result", l)  # [batch pos head d_model]
            else:
                z = self._need("z", l)
                result = head_results(z, self._model().output_projection(l), z.device)
            results += list(rearrange(result, "batch pos head d_model -> head batch pos d_model"))
            labels += [head_name(l, head) for head in range(result.shape[2])]
        if incl_remainder:
            whole = self._stream(stop)
            results.append(whole - torch.stack(results).sum(0) if results else whole)
            labels.append("remainder")
        if not results:
            raise HookValueError("There are no heads below layer 0; give `layer` at least 1, or None for all.")
        stack = torch.stack(results)  # [component batch pos d_model]
        return self._labelled(self._scaled(stack, layer) if apply_ln else stack, labels, return_labels)

    def apply_ln_to_stack(self, stack: Stack, layer: int | None = None) -> Stack:
        r"""Scale the components of a sum as a norm scales the sum: linear, so attributions add up.

        $g \odot c / \sqrt{\overline{x^2} + \epsilon}$ for each component c of the norm's input x, with its gain g.
        TransformerLens expects g to be folded into the weights that follow, and leaves it out.

        Args:
            stack: `[component batch pos d_model]`.
            layer: The block whose input the components sum to, for its first norm, before attention; None or -1: the
                final norm.
        """
        return self._unbatched(self._scaled(self._batched(stack), layer), 1)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _need(self, *key: object) -> Tensor:
        try:
            return value_of(self.entry(key[0] if len(key) == 1 else key))
        except HookNameError as error:
            hint = "Run with `names_filter=None`, or with a filter that keeps it."
            raise HookNameError(f"This needs {key!r} in the cache. {error} {hint}") from error

    def _model(self) -> Model:
        if self.model is None:
            raise InputError("This needs the model's weights: load with `ActivationCache.load(path, model=model)`.")
        return self.model

    def _layer(self, layer: int | None) -> int:
        """How many blocks are below `layer`; None and -1 are the end, as in TransformerLens."""
        count = self._n_layers["text"]
        if layer is None or layer == -1:
            return count
        if not 0 <= layer <= count:
            raise HookNameError(
                f"Layer {layer} is out of range: the model has {count} blocks. Give the number of a block, or {count}, "
                "None or -1 for the end; other negative numbers have no meaning here."
            )
        return layer

    def _visual(self, like: Tensor) -> Bool[Tensor, "batch pos 1"]:
        mask = self.row_mask("visual", like.shape[0])
        if mask is None:
            raise InputError("These inputs do not specify which positions are visual; use `model.prepare`.")
        if mask.shape[1] != like.shape[1]:
            raise HookValueError(
                f"The cache keeps {like.shape[1]} of {mask.shape[1]} positions: a decomposition needs all of them "
                "(run without `pos_slice`)."
            )
        return mask.to(like.device)[..., None]

    def _deepstack(self, layer: int, like: Tensor) -> Tensor:
        visual = None if ("deepstack", layer) in self else self.row_mask("visual", like.shape[0])
        if visual is not None and not bool(visual.any()):
            return torch.zeros_like(like)  # without an image nothing is added
        return self._need("deepstack", layer)

    def _stream(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters a block, or after the last one the final norm."""
        count = self._n_layers["text"]
        if layer < count:
            return self._need("resid_pre", layer)
        final = self._need("resid_post", count - 1)
        return final + self._deepstack(count - 1, final) if self._model().cfg.n_deepstack == count else final

    def _scaled(self, stack: Tensor, layer: int | None = None) -> Tensor:
        """Components `[component batch pos d_model]` as the norm of a block's input scales their sum."""
        stop = self._layer(layer)
        norm, name = self._norm(stop)
        scale = self._need(name) if name in self else scale_of(norm, self._stream(stop))  # [batch pos 1]
        gain, _ = gain_and_bias(norm, self._model().dtype, stack.shape[-1])
        assert gain is not None  # norms of the language model are RMSNorms
        return (stack.float() / scale * gain.to(stack.device).float()).to(stack.dtype)

    def _norm(self, layer: int) -> tuple[torch.nn.Module, str]:
        """The first norm of a block, or after the last block the final norm, and the hook point of its scale."""
        model = self._model()
        if layer == self._n_layers["text"]:
            return model.ln_final, "ln_final.hook_scale"
        parts = model.family.text
        return parts.modules(model.hf_model)[layer].get_submodule(parts.block.ln1), f"blocks.{layer}.ln1.hook_scale"

    def _at(self, stack: Tensor, positions: Positions) -> Tensor:
        """`[component batch pos d_model]` at some positions: `[component batch query d_model]`; NaN where absent."""
        index = self.positions(positions, stack.shape[1], stack.shape[2])
        return torch.stack([take(c, index.to(c.device), dim=1, absent=torch.nan) for c in stack])

    def _batched(self, stack: Tensor) -> Tensor:
        return stack if self.has_batch_dim or stack.dim() == 4 else stack.unsqueeze(1)

    def _labelled(self, stack: Tensor, labels: list[str], return_labels: bool) -> Any:
        stack = self._unbatched(stack, 1)
        return (stack, labels) if return_labels else stack
