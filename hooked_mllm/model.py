"""HookedMLLM: a multimodal language model of transformers with every activation named."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from hooked_mllm.attention.backends import AttentionBackend, is_known
from hooked_mllm.attention.protocol import Metric, ModelInfo
from hooked_mllm.cache import ActivationCache, GenerationCache
from hooked_mllm.cache.run import CacheRequest, run_cached
from hooked_mllm.checks import self_check
from hooked_mllm.config import HookedConfig
from hooked_mllm.errors import HookValueError, InputError, UnsupportedModelError
from hooked_mllm.families.registry import family_of
from hooked_mllm.hooking import HookMethods
from hooked_mllm.hooks.registry import NameFilter
from hooked_mllm.inputs import ModelInput, ResolvedInput, resolve_input
from hooked_mllm.loading import load_model
from hooked_mllm.measure import measure
from hooked_mllm.prepare import Preparer
from hooked_mllm.running import (
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
from hooked_mllm.sample import Sample, SampleBatch
from hooked_mllm.version import __version__
from hooked_mllm.wiring import wire

ReturnType = Literal["logits", "loss", "both", "output"]


class HookedMLLM(HookMethods):
    """A multimodal language model with a name for every activation: read it, edit it, score its heads.

    The transformers model inside is not changed: no module is replaced, and with no hook added it runs as it always
    does.

    Attributes:
        hf_model: The transformers model.
        processor: Its processor, or None.
        cfg: Its sizes.
        family: What is particular to its family.
        name: The checkpoint's name or path.
        revision: Its revision, if one was asked for.

    Example:
        >>> from hooked_mllm import Box, HookedMLLM, metrics, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> samples = toys.VisualRetrieval(pages=1).samples(model, 2)
        >>> logits, cache = model.run_with_cache(samples[0])
        >>> scores = model.measure(samples, metrics.RetrievalAttentionMass(), progress=False)
        >>> len(scores.top(4))
        4
    """

    def __init__(
        self,
        hf_model: nn.Module,
        processor: Any = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        check: bool = True,
    ) -> None:
        config: Any = getattr(hf_model, "config", None)
        self.family = family_of(config)
        if type(hf_model).__name__ not in self.family.model_classes:
            raise UnsupportedModelError(
                f"Expected {' or '.join(self.family.model_classes)}; got {type(hf_model).__name__}. Pass the whole "
                "model, with its language-model head."
            )
        self.hf_model: Any = hf_model
        self.processor = processor
        self.name = name or getattr(config, "_name_or_path", "") or type(hf_model).__name__
        self.revision = revision
        self.wiring = wire(hf_model, self.family)
        self.registry = self.wiring.registry
        self.cfg = HookedConfig.of(hf_model, self.family)
        if check:
            self.check()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        revision: str | None = None,
        attention: str | Mapping[str, str] | AttentionBackend | None = None,
        check: bool = True,
        **kwargs: Any,
    ) -> "HookedMLLM":
        """Load a checkpoint: a folder, a hub id, or a bundled toy such as "toy-qwen3-vl".

        Only safetensors are read and no code of the checkpoint is run. Parameters are frozen, since gradients here are
        those of activations; `model.hf_model.requires_grad_(True)` undoes it.

        Args:
            path_or_id: The checkpoint.
            dtype: "bfloat16", "float16", "float32", or "auto" for the checkpoint's own.
            device: Put the whole model there.
            device_map: Or spread it, as transformers does ("auto").
            revision: A branch, tag or commit of the hub.
            attention: A transformers implementation ("sdpa", "eager", ...) for both towers, a mapping of "text" and
                "vision" to such names, or a backend of your own for the language model.
            check: Verify the wiring on a small input (see `check`).
            **kwargs: For transformers' `from_pretrained`.

        Raises:
            InputError: when there is no such checkpoint, it is damaged, or arguments contradict each other.
            UnsupportedModelError: for another kind of model, or one that needs code of its own.
        """
        own: Any = attention if attention is not None and not isinstance(attention, str | Mapping) else None
        named: Any = None if own is not None else attention
        hf_model, processor = load_model(path_or_id, dtype, device, device_map, revision, named, **kwargs)
        model = cls(hf_model, processor, name=str(path_or_id), revision=revision, check=check)
        if own is not None:
            model._set_backend(own, "text")
        return model

    @classmethod
    def from_model(cls, hf_model: nn.Module, processor: Any = None, *, check: bool = True) -> "HookedMLLM":
        """Wrap a transformers model that is in memory; without a processor, everything but `prepare` works.

        Args:
            hf_model: An instance of one of the supported classes. It is not changed, and stays usable by itself.
            processor: Its processor.
            check: Verify the wiring on a small input.

        Raises:
            UnsupportedModelError: for a model of another class.
        """
        return cls(hf_model, processor, check=check)

    def __repr__(self) -> str:
        cfg = self.cfg
        return (
            f"HookedMLLM({self.name!r}, {cfg.model_class}, {cfg.n_layers} layers x {cfg.n_heads} heads "
            f"({cfg.n_key_value_heads} key-value), vision {cfg.vision_n_layers} x {cfg.vision_n_heads}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device})"
        )

    # -- the model's parts -----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embeddings."""
        return self.hf_model.get_submodule(self.family.embed).weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.hf_model.dtype

    @property
    def ln_final(self) -> Any:
        """The final norm."""
        return self.hf_model.get_submodule(self.family.ln_final)

    @property
    def lm_head(self) -> Any:
        """The unembedding."""
        return self.hf_model.get_submodule(self.family.lm_head)

    def output_projection(self, layer: int) -> Any:
        """W_O of one block, as the module that applies it."""
        return self.wiring.output_projection(self.wiring.text[layer])

    def unembed(self, tokens: Any, batch: int) -> Tensor:
        """Columns of the unembedding, one a sample: `[batch d_model]`.

        Args:
            tokens: An id, a string that is one token, or one id a sample.
            batch: Number of samples.

        Raises:
            InputError: for a string of several tokens or an id outside the vocabulary.
        """
        if isinstance(tokens, str):
            if self.processor is None:
                raise InputError("A token given as text needs a processor; give its id.")
            ids = self.processor.tokenizer.encode(tokens, add_special_tokens=False)
            if len(ids) != 1:
                raise InputError(f"{tokens!r} is {len(ids)} tokens; expected one. Give an id.")
            tokens = ids[0]
        index = (
            torch.as_tensor(tokens, dtype=torch.long)
            .reshape(-1)
            .expand(batch if torch.as_tensor(tokens).numel() == 1 else -1)
        )
        if len(index) != batch:
            raise InputError(f"Expected one token, or one for each of {batch} samples; got {len(index)}.")
        if bool(((index < 0) | (index >= self.cfg.d_vocab)).any()):
            raise InputError(f"Token ids {index.tolist()} reach outside the vocabulary of {self.cfg.d_vocab}.")
        weight = self.lm_head.weight
        return weight[index.to(weight.device)]

    @property
    def info(self) -> ModelInfo:
        """The facts that results of this model carry."""
        packages = {"torch": torch, "transformers": transformers}
        return ModelInfo(
            n_layers=self.cfg.n_layers,
            n_heads=self.cfg.n_heads,
            n_kv_heads=self.cfg.n_key_value_heads,
            model=self.name,
            revision=self.revision,
            family=self.family.name,
            attention=self.wiring.switches["text"].base,
            dtype=str(self.dtype).removeprefix("torch."),
            versions={**{n: str(p.__version__) for n, p in packages.items()}, "hooked_mllm": __version__},
        )

    def to(self, *args: Any, **kwargs: Any) -> "HookedMLLM":
        """Move the model, as `torch.nn.Module.to`; a model spread by `device_map` stays where it is.

        Raises:
            InputError: for a model that is spread over devices.
        """
        if getattr(self.hf_model, "hf_device_map", None):
            raise InputError("This model was spread by device_map; load it again with another one to move it.")
        self.hf_model.to(*args, **kwargs)
        return self

    # -- inputs ----------------------------------------------------------------------------------------------------

    @cached_property
    def _preparer(self) -> Preparer:
        return Preparer(self.processor, self.hf_model.config, self.family)

    def prepare(self, question: str | Sequence[str], images: Any = None, videos: Any = None, **options: Any) -> Any:
        """Build model inputs through the model's own processor and chat template, and the layout of their tokens.

        Args:
            question: The question, or a list of them for a batch; everything else is then a list of as many.
            images: A picture or several: PIL images, paths, arrays.
            videos: A video or several: paths, `Video`s, pairs (frames, fps).
            **options: `system=`, `answer=` (teacher forcing), `target=` (the region asked about), `id=`, `fps=`,
                `num_frames=`, `max_frames=`, `min_overlap=`, `padding_side=`, and options of the processor; see
                `Preparer`.

        Returns:
            A `Sample`, or a `SampleBatch` for a list.

        Raises:
            InputError: for inputs that are missing, damaged or contradictory, or without a processor.
            LayoutError: when the question is not found, or the target maps to no token.

        Example:
            >>> from PIL import Image
            >>> from hooked_mllm import Box, HookedMLLM
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = model.prepare("what color is the star ?", images=Image.new("RGB", (96, 96)), target=Box(0, 0,
            16, 16))
            >>> int(sample.mask("target").sum())
            1
        """
        return self._preparer(question, images, videos, **options)

    def resolve(self, inputs: ModelInput) -> ResolvedInput:
        """Check inputs of any accepted kind and bring them to the model's device."""
        return resolve_input(inputs, self.family, self.hf_model.config, self.device)

    # -- running ---------------------------------------------------------------------------------------------------

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
                with stopping_at(stop_module(self.hf_model, self.family, stop_at_layer)):
                    self.hf_model(**arguments)
            except StopForwardError as stopped:
                return stopped.residual
            raise AssertionError("the forward pass did not reach the block it was to stop at")
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
        with counting_steps(self.hf_model, self.registry.clock), checking_half(self.hf_model):
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

        Example:
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

    def measure(
        self,
        samples: ModelInput | Iterable[ModelInput],
        metrics: Metric | Sequence[Metric],
        *,
        checkpoint: Any = None,
        save_every: int = 20,
        progress: bool = True,
    ) -> Any:
        """Score attention heads: one forward pass a sample, without logits, its attention rows shared by all metrics.

        The model keeps its fast attention; only the rows that a metric asks for are computed, in float32. Under
        `torch.distributed`, give each process its own samples: results are summed over processes.

        Args:
            samples: Samples, batches or mappings; one, a list, or an iterator that makes them as they are needed.
            metrics: A metric or several.
            checkpoint: A file in which the state is kept every `save_every` samples and when interrupted; a later call
                with the same samples, metrics and file goes on where that one stopped.
            save_every: Samples between two savings.
            progress: Show a progress bar.

        Returns:
            What the metric computes, mostly `HeadScores`; a list of as many for several metrics.

        Raises:
            InputError: when a metric needs what a sample lacks, such as a target, or there is no sample.
            NumericsError: when attention is not finite, as after an overflow in float16.

        Example:
            >>> from hooked_mllm import HookedMLLM, metrics, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> samples = toys.VisualRetrieval(pages=1).samples(model, 2)
            >>> ram, mass = model.measure(
            ...     samples, [metrics.RetrievalAttentionMass(), metrics.VisionMass()], progress=False
            ... )
        """
        return measure(self, samples, metrics, checkpoint=checkpoint, save_every=save_every, progress=progress)

    # -- attention -------------------------------------------------------------------------------------------------

    def _set_backend(self, backend: AttentionBackend | None, tower: str) -> None:
        for site in self.wiring.text if tower == "text" else self.wiring.vision:
            site.backend = backend
            site.refresh()

    @contextmanager
    def attention(self, implementation: str | AttentionBackend, tower: str = "text") -> Iterator[None]:
        """Run another attention for the body of a `with`; hooks and metrics work the same under each.

        Args:
            implementation: A name of transformers' ("eager", "sdpa", ...), or a callable
                `(q, k, v, mask, scale, layer) -> z` (see `AttentionBackend`).
            tower: "text" or "vision".

        Raises:
            HookValueError: for an unknown name or tower.

        Example:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> with model.attention("eager"):
            ...     logits = model(sample)
        """
        if tower not in self.wiring.switches:
            raise HookValueError(f"tower is 'text' or 'vision'; got {tower!r}.")
        with ExitStack() as stack:
            if isinstance(implementation, str):
                if not is_known(implementation):
                    raise HookValueError(
                        f"transformers knows no attention implementation {implementation!r}; 'eager' and 'sdpa' are "
                        "always there."
                    )
                stack.enter_context(self.wiring.switches[tower].using(implementation))
            elif callable(implementation):
                sites = self.wiring.text if tower == "text" else self.wiring.vision
                stack.callback(self._set_backend, sites[0].backend, tower)
                self._set_backend(implementation, tower)
            else:
                raise HookValueError(f"Expected a name or a callable; got {type(implementation).__name__}.")
            yield

    # -- trust -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Verify the wiring on a small input, with an image where there is a processor.

        Checked: every part is there; hooked logits equal plain ones bit for bit; every hook point fires; patterns sum
        to one and give z back; the layout counts as many visual tokens as the model.

        Raises:
            UnsupportedModelError: naming what failed.
        """
        self_check(self)


__all__ = ["ActivationCache", "GenerationCache", "HookedMLLM", "Sample", "SampleBatch"]
