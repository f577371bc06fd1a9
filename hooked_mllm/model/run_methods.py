"""How HookedMLLM runs: a forward pass, a part of one, a generation, each with its activations kept if asked for."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_mllm.cache import GenerationCache
from hooked_mllm.cache.run import CacheRequest, run_cached
from hooked_mllm.errors import HookValueError
from hooked_mllm.families.base import Family
from hooked_mllm.hooks.registry import HookRegistry, NameFilter
from hooked_mllm.inputs.resolve import ModelInput, ResolvedInput
from hooked_mllm.model.running import (
    StopForwardError,
    check_arguments,
    check_generation,
    check_half,
    checking_half,
    counting_steps,
    labels_of,
    stop_module,
    stopping_at,
)

ReturnType = Literal["logits", "loss", "both", "output"]


class RunMethods:
    """Running the model; a part of `HookedMLLM`."""

    hf_model: Any
    family: Family
    registry: HookRegistry
    resolve: Callable[..., ResolvedInput]

    def forward(
        self,
        inputs: ModelInput | None = None,
        *,
        return_type: ReturnType | None = "logits",
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """One forward pass.

        Args:
            inputs: A sample, a batch, or a mapping of model inputs; or none, with the model inputs as keywords.
            return_type: "logits" `[batch pos vocab]`; "loss" (mean negative log-likelihood of the answer's tokens, or
                of `labels`); "both"; "output" for transformers' own output; None to compute no logits.
            stop_at_layer: Return the residual stream `[batch pos d_model]` entering this block and run no further;
                negative counts from the end.
            **kwargs: For the transformers model, such as `logits_to_keep=1`.

        Raises:
            InputError: for inputs that the model would get wrong, or arguments that it does not know.
            NumericsError: when float16 overflowed.
        """
        if inputs is None:
            check_arguments(self.hf_model, kwargs)
            return self.run(self.resolve(kwargs), return_type, stop_at_layer)
        return self.run(self.resolve(inputs), return_type, stop_at_layer, **kwargs)

    __call__ = forward

    def run(
        self,
        inputs: ResolvedInput,
        return_type: ReturnType | None = "logits",
        stop_at_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """`forward` on inputs that are checked already."""
        if return_type not in ("logits", "loss", "both", "output", None):
            raise HookValueError(f"return_type is 'logits', 'loss', 'both', 'output' or None; got {return_type!r}.")
        check_arguments(self.hf_model, kwargs)
        if return_type is None and stop_at_layer is None:
            self.run_trunk(inputs, **kwargs)
            return None
        arguments = {"use_cache": False, **inputs.tensors, **kwargs}
        if return_type in ("loss", "both"):
            arguments["labels"] = labels_of(inputs)
        if arguments.get("past_key_values") is None:
            self.family.reset(self.hf_model)
        if stop_at_layer is not None:
            try:
                stop = stop_module(self.hf_model, self.family, stop_at_layer)
                with self.registry.running_on(inputs), stopping_at(stop):
                    self.hf_model(**arguments)
            except StopForwardError as stopped:
                return stopped.residual
            raise AssertionError("the forward pass did not reach the block it was to stop at")
        with self.registry.running_on(inputs):
            output = self.hf_model(**arguments)
        check_half(output.logits)
        if return_type == "output":
            return output
        if return_type == "both":
            return output.logits, output.loss
        return output.loss if return_type == "loss" else output.logits

    def run_trunk(self, inputs: ResolvedInput, **kwargs: Any) -> None:
        """A forward pass without the unembedding, for what hooks and taps see on the way."""
        self.family.reset(self.hf_model)
        tensors = {k: v for k, v in inputs.tensors.items() if k not in ("labels", "logits_to_keep")}
        with self.registry.running_on(inputs):
            self.hf_model.model(**{"use_cache": False, **tensors, **kwargs})

    @torch.no_grad()
    def generate(self, inputs: ModelInput | None = None, **kwargs: Any) -> Tensor:
        """Generate, with hooks firing in the prefill (`hook.step == 0`) and in every decoding step (`hook.step == n`).

        Args:
            inputs: A sample, a batch padded on the left, or a mapping of model inputs; or none, with these as keywords.
            **kwargs: For transformers' `generate`, such as `max_new_tokens=20, do_sample=False`.

        Returns:
            What transformers returns: token ids `[batch pos]`, the prompt's included.

        Raises:
            InputError: for a batch padded on the right.
            NumericsError: when float16 overflowed.
        """
        if inputs is None:
            return self.run_generate(self.resolve(kwargs))
        return self.run_generate(self.resolve(inputs), **kwargs)

    def run_generate(self, inputs: ResolvedInput, **kwargs: Any) -> Any:
        """`generate` on inputs that are checked already."""
        check_generation(inputs)
        self.family.reset(self.hf_model)
        tensors = {k: v for k, v in inputs.tensors.items() if k != "labels"}
        counting = counting_steps(self.hf_model, self.registry.clock)
        with self.registry.running_on(inputs), counting, checking_half(self.hf_model):
            return self.hf_model.generate(**{**tensors, **kwargs})

    def run_with_cache(
        self,
        inputs: ModelInput,
        names_filter: NameFilter = None,
        *,
        device: torch.device | str | None = None,
        incl_bwd: bool | Callable[[Tensor], Tensor] = False,
        stop_at_layer: int | None = None,
        queries: Any = None,
        keys: Any = None,
        return_logits: bool = True,
        generate: Mapping[str, Any] | None = None,
        pos_slice: Any = None,
        remove_batch_dim: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        return_cache_object: bool = True,
        **forward: Any,
    ) -> tuple[Any, Any]:
        """One forward pass, or a generation, with the activations kept.

        Caching changes nothing: activations are seen after the edits of hooks that hang already, attention patterns are
        recomputed in float32 when they are read, and the model keeps its fast attention.

        Args:
            inputs: A sample, a batch, or a mapping of model inputs.
            names_filter: What to keep: None (all), a name, a glob, a regular expression, a predicate, or a list of
                these.
            device: Move what is kept there, such as "cpu".
            incl_bwd: Also keep gradients under `<name>_grad`: True for those of the loss (of the answer or of
                `labels`), or a function that makes a scalar of the logits. Gradients of scores and patterns are kept
                only if `names_filter` names them, for they need N x N memory.
            stop_at_layer: Run only the blocks below it and return the residual stream entering it.
            queries: Rows of patterns and scores to keep: a token kind such as "question", a mask, indices, or a slice.
            keys: Columns of patterns and scores to keep, given alike; with both, patterns are computed at once.
            return_logits: False computes no logits and returns None in their place.
            generate: Arguments of `generate`; each step is then kept.
            pos_slice: Keep only these positions of what has positions in the language model, and these pattern rows.
            remove_batch_dim: Drop the batch axis of a batch of one.
            reset_hooks_end: Take the caching hooks away at the end (they always are).
            clear_contexts: Empty the points' contexts at the end.
            return_cache_object: False returns a dictionary of tensors, every pattern computed.
            **forward: For the transformers model.

        Returns:
            Logits and an ActivationCache; the residual stream with `stop_at_layer`; token ids and a GenerationCache
            with `generate`; the loss with `incl_bwd`, if it is True.

        Raises:
            HookNameError: for a name that this model lacks.
            HookValueError: for options that exclude each other.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> logits, cache = model.run_with_cache(sample, names_filter="*hook_pattern", queries="question")
            >>> cache["pattern", 2].shape[2] == int(sample.mask("question").sum())
            True
        """
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
            output, cache = run_cached(self, self.resolve(inputs), request)
        finally:
            if clear_contexts:
                self.registry.clear_contexts()
        if return_cache_object:
            return output, cache
        if isinstance(cache, GenerationCache):
            return output, [dict(step.items()) for step in cache.steps]
        return output, dict(cache.items())
