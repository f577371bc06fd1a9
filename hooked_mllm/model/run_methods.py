"""How HookedMLLM runs: a forward pass, a part of one, or a generation; with its activations cached on request."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils import ModelOutput

from hooked_mllm.cache import ActivationCache, GenerationCache
from hooked_mllm.cache.activation_cache import Positions
from hooked_mllm.cache.run import CacheRequest, cached_forward, cached_generation
from hooked_mllm.contracts import Model, ReturnType
from hooked_mllm.errors import HookNameError, HookValueError
from hooked_mllm.families.base import Family
from hooked_mllm.hooks.registry import HookRegistry, NameFilter
from hooked_mllm.inputs.resolve import ResolvedInput, RunInput
from hooked_mllm.model.run_checks import (
    arguments_of,
    check_arguments,
    check_generation,
    check_half,
    checking_half,
    labels_of,
    processor_outputs,
)
from hooked_mllm.model.running import following_steps, running
from hooked_mllm.wiring.compiled import UNCOMPILED


class StopForwardError(Exception):
    """Carries the residual stream, its only argument, out of a forward pass that ends at a block."""


class RunMethods:
    """Running the model; a part of `HookedMLLM`."""

    hf_model: Any
    family: Family
    registry: HookRegistry
    resolve: Callable[[RunInput], ResolvedInput]

    @overload
    def forward(
        self,
        inputs: RunInput | None = None,
        *,
        return_type: Literal["logits", "loss"] = "logits",
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> Tensor: ...

    @overload
    def forward(
        self, inputs: RunInput | None = None, *, return_type: Literal["both"], **kwargs: Any
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, inputs: RunInput | None = None, *, return_type: Literal["output"], **kwargs: Any
    ) -> ModelOutput: ...

    @overload
    def forward(
        self, inputs: RunInput | None = None, *, return_type: None, stop_at_layer: int, **kwargs: Any
    ) -> Tensor: ...

    @overload
    def forward(
        self, inputs: RunInput | None = None, *, return_type: None, stop_at_layer: None = None, **kwargs: Any
    ) -> None: ...

    def forward(
        self,
        inputs: RunInput | None = None,
        *,
        return_type: ReturnType | None = "logits",
        stop_at_layer: int | None = None,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor] | ModelOutput | None:
        """One forward pass.

        Args:
            inputs: A sample, a batch, a list of samples (then a batch padded on the left), or a mapping of model
                inputs; or none, with the model inputs as keywords.
            return_type: "logits" `[batch pos vocab]`; "loss" (mean negative log-likelihood of the answer's tokens, or
                of `labels`); "both"; "output" for transformers' own output; None to compute no logits.
            stop_at_layer: Return the residual stream `[batch pos d_model]` entering this block and run no further
                block; a negative number counts from the end.
            prompt_length: Positions of the prompt, where the inputs are a part of it behind `past_key_values`; without
                it, one token behind a KV cache counts as generated, several as the end of the prompt.
            **kwargs: For the transformers model, such as `logits_to_keep=1`.

        Raises:
            InputError: For inputs that the model would process wrongly, or arguments that it does not have.
            NumericsError: When float16 overflowed.
        """
        if inputs is None:
            return self.run(self.resolve(kwargs), return_type, stop_at_layer, prompt_length)
        return self.run(self.resolve(inputs), return_type, stop_at_layer, prompt_length, **kwargs)

    __call__ = forward

    def run(
        self,
        inputs: ResolvedInput,
        return_type: ReturnType | None = "logits",
        stop_at_layer: int | None = None,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """`forward` on resolved inputs."""
        if return_type not in ("logits", "loss", "both", "output", None):
            raise HookValueError(f"return_type is 'logits', 'loss', 'both', 'output' or None; got {return_type!r}.")
        check_arguments(self.hf_model, kwargs)
        if return_type is None and stop_at_layer is None:
            self.run_trunk(inputs, prompt_length, **kwargs)
            return None
        arguments = {"use_cache": False, **inputs.tensors, **kwargs}
        if return_type in ("loss", "both"):
            arguments["labels"] = labels_of(inputs)
        if stop_at_layer is not None:
            return self._run_to(stop_at_layer, inputs, arguments, prompt_length)
        with running(cast(Model, self), inputs, arguments, prompt_length=prompt_length):
            output = self.hf_model(**arguments)
        check_half(output.logits)
        if return_type == "output":
            return output
        if return_type == "both":
            return output.logits, output.loss
        return output.loss if return_type == "loss" else output.logits

    def _run_to(
        self, layer: int, inputs: ResolvedInput, arguments: dict[str, Any], prompt_length: int | None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that enters block `layer`; later blocks do not run."""
        blocks = self.hf_model.get_submodule(self.family.text.blocks)
        if not -len(blocks) <= layer <= len(blocks):
            raise HookNameError(f"stop_at_layer={layer} is out of range: the model has {len(blocks)} blocks.")
        layer = layer + len(blocks) if layer < 0 else layer
        module = self.hf_model.get_submodule(self.family.ln_final) if layer == len(blocks) else blocks[layer]

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.registry.context.run is run:  # not a run that a hook starts inside of this one
                raise StopForwardError(args[0] if args else kwargs["hidden_states"])

        with UNCOMPILED, running(cast(Model, self), inputs, arguments, layer, prompt_length=prompt_length) as run:
            with module.register_forward_pre_hook(stop, prepend=True, with_kwargs=True):
                try:
                    self.hf_model(**arguments)
                except StopForwardError as stopped:
                    return stopped.args[0]
        raise AssertionError(f"the forward pass did not reach block {layer}")

    def run_trunk(self, inputs: ResolvedInput, prompt_length: int | None = None, **kwargs: Any) -> None:
        """A forward pass without the unembedding, for hooks and attention taps."""
        tensors = {k: v for k, v in inputs.tensors.items() if k not in ("labels", "logits_to_keep")}
        arguments = {"use_cache": False, **tensors, **kwargs}
        with running(cast(Model, self), inputs, arguments, head=False, prompt_length=prompt_length):
            self.hf_model.model(**arguments)

    @overload
    def generate(
        self, inputs: RunInput | None = None, *, return_dict_in_generate: Literal[True], **kwargs: Any
    ) -> ModelOutput: ...

    @overload
    def generate(
        self, inputs: RunInput | None = None, *, return_dict_in_generate: Literal[False] = False, **kwargs: Any
    ) -> Tensor: ...

    @torch.no_grad()
    def generate(self, inputs: RunInput | None = None, **kwargs: Any) -> Tensor | ModelOutput:
        """Generate; hooks fire in the prefill (`hook.step == 0`) and in every decoding step (`hook.step == n`).

        Args:
            inputs: A sample, a batch padded on the left, a list of samples, or a mapping of model inputs; or none, with
                these as keywords.
            **kwargs: For transformers' `generate`, such as `max_new_tokens=20, do_sample=False`.

        Returns:
            Token ids `[batch pos]`, the prompt's included; transformers' object with `return_dict_in_generate=True`.

        Raises:
            InputError: For a batch padded on the right.
            NumericsError: When float16 overflowed.
        """
        if inputs is None:
            names = kwargs.keys() & (arguments_of(type(self.hf_model)) | processor_outputs(None))
            inputs = {name: kwargs.pop(name) for name in sorted(names)}
        return self.run_generate(self.resolve(inputs), **kwargs)

    def run_generate(self, inputs: ResolvedInput, **kwargs: Any) -> Any:
        """`generate` on resolved inputs."""
        check_generation(inputs)
        arguments = {**{k: v for k, v in inputs.tensors.items() if k != "labels"}, **kwargs}
        hf_model, attention = self.hf_model, arguments.get("attention_mask")
        length = inputs.length if attention is None else attention.shape[-1]  # with tokens that are in a KV cache alone
        past = {"past_key_values": arguments.get("past_key_values")}
        with running(cast(Model, self), inputs, past) as run, following_steps(cast(Model, self), run, length):
            with checking_half(hf_model):
                return hf_model.generate(**arguments)

    @overload
    def run_with_cache(
        self,
        inputs: RunInput,
        names_filter: NameFilter = None,
        *,
        return_logits: Literal[True] = True,
        generate: None = None,
        return_cache_object: Literal[True] = True,
        **options: Any,
    ) -> tuple[Tensor, ActivationCache]: ...

    @overload
    def run_with_cache(
        self, inputs: RunInput, names_filter: NameFilter = None, *, return_logits: Literal[False], **options: Any
    ) -> tuple[Tensor | None, ActivationCache]: ...

    @overload
    def run_with_cache(
        self, inputs: RunInput, names_filter: NameFilter = None, *, generate: Mapping[str, Any], **options: Any
    ) -> tuple[Tensor, GenerationCache]: ...

    @overload
    def run_with_cache(
        self, inputs: RunInput, names_filter: NameFilter = None, *, return_cache_object: bool, **options: Any
    ) -> tuple[Any, Any]: ...

    def run_with_cache(
        self,
        inputs: RunInput,
        names_filter: NameFilter = None,
        *,
        device: torch.device | str | None = None,
        incl_bwd: bool | Callable[[Tensor], Tensor] = False,
        stop_at_layer: int | None = None,
        queries: Positions | None = None,
        keys: Positions | None = None,
        return_logits: bool = True,
        generate: Mapping[str, Any] | None = None,
        pos_slice: Positions | None = None,
        remove_batch_dim: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_cache_object: bool = True,
        **forward: Any,
    ) -> tuple[
        Tensor | ModelOutput | None, ActivationCache | GenerationCache | dict[str, Tensor] | list[dict[str, Tensor]]
    ]:
        """One forward pass, or a generation, with its activations cached.

        Caching does not change the run: activations are cached after the edits of registered hooks, attention patterns
        are recomputed in float32 when they are read, and the model keeps its fast attention.

        Args:
            inputs: A sample, a batch, a list of samples, or a mapping of model inputs.
            names_filter: None for all, a name, a glob, a regular expression, a predicate on names, or a list of these.
            device: Where cached tensors are moved, such as "cpu".
            incl_bwd: Also cache gradients under `<name>_grad`: True for those of the loss, or a function from logits to
                a scalar. Those of scores and patterns, N x N in memory, are cached only if `names_filter` names them.
            stop_at_layer: Run only the blocks below it and return the residual stream entering it.
            queries: Rows of patterns and scores to keep: a token kind such as "question", a mask, indices, or a slice.
            keys: Columns of patterns and scores to keep, likewise; with both, patterns are computed in the run.
            return_logits: False computes no logits and returns None in their place.
            generate: Arguments of `generate`; every step is then cached.
            pos_slice: Keep only these positions of what has positions in the language model, and these pattern rows. As
                in TransformerLens, `(3, 8)` is the range 3 to 7, and a list is indices. In a batch of unequal samples,
                the positions that a sample lacks are NaN.
            remove_batch_dim: Drop the batch axis of a batch of one.
            reset_hooks_end: Remove the caching hooks at the end (they always are).
            clear_contexts: Empty the points' contexts at the end.
            return_cache_object: False returns a dictionary of tensors, every pattern computed.
            **forward: For the transformers model.

        Returns:
            Logits and an ActivationCache; the residual stream with `stop_at_layer`; token ids and a GenerationCache
            with `generate`; the loss with `incl_bwd`, if it is True.

        Raises:
            HookNameError: For a name that this model does not have.
            HookValueError: For options that exclude each other.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> logits, cache = model.run_with_cache(sample, names_filter="*hook_pattern", queries="question")
            >>> cache["pattern", 2].shape[2] == int(sample.mask("question").sum())
            True
        """
        if "return_type" in forward:
            raise HookValueError(
                "run_with_cache returns logits, and takes no return_type: use return_logits=False for none, "
                "incl_bwd=True for the loss, or model.hooks around model(inputs, return_type=...)."
            )
        request = CacheRequest(
            names_filter=names_filter,
            device=device,
            incl_bwd=incl_bwd,
            stop_at_layer=stop_at_layer,
            queries=queries,
            keys=keys,
            return_logits=return_logits,
            generate=generate,
            pos_slice=pos_slice,
            remove_batch_dim=remove_batch_dim,
            forward=forward,
        )
        try:
            if generate is not None:
                tokens, steps = cached_generation(cast(Model, self), self.resolve(inputs), request)
                return tokens, steps if return_cache_object else [dict(step.items()) for step in steps]
            output, cache = cached_forward(cast(Model, self), self.resolve(inputs), request)
            return output, cache if return_cache_object else dict(cache.items())
        finally:
            if clear_contexts:
                self.registry.clear_contexts()
