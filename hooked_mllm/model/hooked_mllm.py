"""HookedMLLM: a multimodal language model of transformers with a name for every activation."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any, TypeVar, cast, overload

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooked_mllm.checks import as_device, checked
from hooked_mllm.contracts import AnyImages, AnyVideos, Metric, ModelInfo
from hooked_mllm.errors import InputError, UnsupportedModelError
from hooked_mllm.families.config import HookedConfig
from hooked_mllm.families.registry import family_of
from hooked_mllm.inputs.preparer import Preparer
from hooked_mllm.inputs.resolve import ModelInput, ResolvedInput, RunInput, resolve_input
from hooked_mllm.inputs.sample import Sample, SampleBatch
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.measuring.measure import measure
from hooked_mllm.model.attention_methods import AttentionChoice, AttentionMethods, split_attention
from hooked_mllm.model.copies import Copies
from hooked_mllm.model.direct_calls import DirectCalls
from hooked_mllm.model.generate_options import checking_options
from hooked_mllm.model.hook_methods import HookMethods
from hooked_mllm.model.loading import load_model
from hooked_mllm.model.run_checks import check_arguments, processor_outputs
from hooked_mllm.model.run_methods import RunMethods
from hooked_mllm.model.self_check import self_check
from hooked_mllm.model.vision_methods import VisionMethods
from hooked_mllm.version import __version__
from hooked_mllm.wiring import wire
from hooked_mllm.wiring.results import device_of, effective_weight

Result = TypeVar("Result")


@checked
class HookedMLLM(Copies, RunMethods, HookMethods, AttentionMethods, VisionMethods):
    """A multimodal language model with a name for every activation: read it, edit it, score its heads.

    No module of the transformers model is replaced; without hooks its logits are bit for bit those of the plain model.

    Attributes:
        hf_model: The transformers model.
        processor: Its processor, or None.
        cfg: Its sizes.
        family: Module names, sizes and token layouts of its family.
        name: The checkpoint's name or path.
        revision: Its revision, if one was given.

    Examples:
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
        hf_model = getattr(hf_model, "_orig_mod", hf_model)  # of `torch.compile(model)`, which has no names of its own
        if processor is not None and not hasattr(processor, "tokenizer"):
            raise InputError(f"Expected the processor of the model, with its tokenizer; got {processor!r}.")
        config: Any = getattr(hf_model, "config", None)
        self.family = family_of(config)
        if type(hf_model).__name__ not in self.family.model_classes:
            advice = "Pass the whole model, with its language-model head."
            if hasattr(hf_model, "get_base_model"):  # of peft
                advice = "Pass `peft_model.get_base_model()`, which has the adapter, or `merge_and_unload()`."
            raise UnsupportedModelError(
                f"Expected {' or '.join(self.family.model_classes)}; got {type(hf_model).__name__}. {advice}"
            )
        self.hf_model: Any = hf_model
        self.processor: Any = processor
        self.name = name or getattr(config, "_name_or_path", "") or type(hf_model).__name__
        self.revision = revision
        self.wiring = wire(cast(PreTrainedModel, hf_model), self.family)
        self.registry = self.wiring.registry
        self.cfg = HookedConfig.of(cast(PreTrainedModel, hf_model), self.family)
        DirectCalls(self)
        if check:
            self.check()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        revision: str | None = None,
        attention: AttentionChoice | None = None,
        check: bool = True,
        **kwargs: Any,
    ) -> "HookedMLLM":
        """Load a checkpoint: a folder, a hub id, or a bundled toy such as "toy-qwen3-vl".

        Only safetensors are read and no code of the checkpoint is run. Parameters are frozen, because gradients are
        taken of activations; `model.hf_model.requires_grad_(True)` unfreezes them.

        Args:
            path_or_id: The checkpoint.
            dtype: "bfloat16", "float16", "float32", or "auto" for the checkpoint's own.
            device: The device of the whole model.
            device_map: Spread the model over devices instead, as transformers does ("auto").
            revision: A branch, tag or commit of the hub.
            attention: A transformers implementation ("sdpa", "eager", ...) for both towers; a backend (see
                `attention`) for the language model; or a mapping of "text" and "vision" to either.
            check: Verify the wiring on a small input (see `check`).
            **kwargs: For transformers' `from_pretrained`.

        Raises:
            InputError: When there is no such checkpoint, it is damaged, or arguments contradict each other.
            UnsupportedModelError: For another kind of model, or one that needs code of its own.
        """
        named, backends = split_attention(attention)
        hf_model, processor = load_model(path_or_id, dtype, device, device_map, revision, named, **kwargs)
        model = cls(hf_model, processor, name=str(path_or_id), revision=revision, check=check)
        for tower, backend in backends.items():
            model.wiring.switches[tower].choose(None, model._fitting(backend, tower))
        return model

    @classmethod
    def from_model(cls, hf_model: nn.Module, processor: Any = None, *, check: bool = True) -> "HookedMLLM":
        """Wrap a transformers model in memory; without a processor, everything except `prepare` works.

        Args:
            hf_model: An instance of one of the supported classes, else `UnsupportedModelError`; of
                `torch.compile(model)`, the model inside (`model.compile()` keeps its compiled runs).
            processor: Its processor.
            check: Verify the wiring on a small input.
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
        """The device of the token embeddings, where inputs go."""
        return device_of(self.hf_model.get_submodule(self.family.embed))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.hf_model.dtype

    @property
    def ln_final(self) -> nn.Module:
        """The final norm."""
        return self.hf_model.get_submodule(self.family.ln_final)

    @property
    def lm_head(self) -> nn.Module:
        """The unembedding."""
        return self.hf_model.get_submodule(self.family.lm_head)

    def output_projection(self, layer: int) -> nn.Module:
        """The module that maps the z of one block to the residual stream (W_O and its bias)."""
        return self.wiring.output_projection(self.wiring.text[layer])

    def unembed(self, tokens: str | int | Sequence[int] | Tensor, batch: int) -> Float[Tensor, "batch d_model"]:
        """Columns of the unembedding, one for each sample.

        Args:
            tokens: An id, a string that is one token, or one id for each sample.
            batch: Number of samples.
        """
        if isinstance(tokens, str):
            if self.processor is None:
                raise InputError("A token given as text needs a processor; give its id.")
            ids = self.processor.tokenizer.encode(tokens, add_special_tokens=False)
            if len(ids) != 1:
                raise InputError(f"{tokens!r} is {len(ids)} tokens; expected one. Give an id.")
            tokens = ids[0]
        try:
            index = torch.as_tensor(tokens, dtype=torch.long).reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"Expected a token, or one for each sample; got {tokens!r}: {error}.") from None
        index = index.expand(batch) if len(index) == 1 else index  # [batch]
        if len(index) != batch:
            raise InputError(f"Expected one token, or one for each of {batch} samples; got {len(index)}.")
        if bool(((index < 0) | (index >= self.cfg.d_vocab)).any()):
            raise InputError(f"Token ids {index.tolist()} are outside the vocabulary of {self.cfg.d_vocab}.")
        return effective_weight(self.lm_head, self.cfg.d_model, self.dtype, index)

    @property
    def info(self) -> ModelInfo:
        """The facts that results of this model carry."""
        attention, settings = self._described_attention()
        packages = {"torch": torch, "transformers": transformers}
        return ModelInfo(
            n_layers=self.cfg.n_layers,
            n_heads=self.cfg.n_heads,
            n_kv_heads=self.cfg.n_key_value_heads,
            model=self.name,
            revision=self.revision,
            family=self.family.name,
            attention=attention,
            attention_settings=settings,
            dtype=str(self.dtype).removeprefix("torch."),
            versions={**{n: str(p.__version__) for n, p in packages.items()}, "hooked_mllm": __version__},
        )

    def to(self, *args: Any, **kwargs: Any) -> "HookedMLLM":
        """Move the model, as `torch.nn.Module.to`; not one that `device_map` spread over devices."""
        if getattr(self.hf_model, "hf_device_map", None):
            raise InputError("This model was spread by device_map; load it again with another one to move it.")
        try:
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
            if dtype is not None and not dtype.is_floating_point:
                raise TypeError(f"{dtype} is of no weights")
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"Expected a device, a dtype or both; got {args or kwargs}: {error}") from None
        if device is not None:
            as_device(device)
        self.hf_model.to(*args, **kwargs)
        return self

    def run_generate(self, inputs: ResolvedInput, **kwargs: Any) -> Any:
        """`generate` on resolved inputs; an `InputError` for options that transformers does not take."""
        with checking_options(self.hf_model, kwargs):
            return super().run_generate(inputs, **kwargs)

    # -- inputs ----------------------------------------------------------------------------------------------------

    @cached_property
    def _preparer(self) -> Preparer:
        return Preparer(self.processor, self.hf_model.config, self.family)

    @overload
    def prepare(self, question: str, images: AnyImages = None, videos: AnyVideos = None, **options: Any) -> Sample: ...

    @overload
    def prepare(
        self, question: list[str] | tuple[str, ...], images: AnyImages = None, videos: AnyVideos = None, **options: Any
    ) -> SampleBatch: ...

    def prepare(
        self, question: str | Sequence[str], images: AnyImages = None, videos: AnyVideos = None, **options: Any
    ) -> Sample | SampleBatch:
        """Build model inputs through the model's own processor and chat template, and the layout of their tokens.

        Args:
            question: The question, or a list of them for a batch; everything else is then a list of the same length.
            images: A picture or several: PIL images, paths, arrays.
            videos: A video or several: paths, `Video`s, pairs (frames, fps).
            **options: `system=`, `answer=` (teacher forcing), `target=` (the region with the evidence), `id=`, `fps=`,
                `num_frames=`, `max_frames=`, `min_overlap=`, `padding_side=`, and options of the processor.

        Raises:
            InputError: For inputs that are missing, damaged or contradictory, or without a processor.
            LayoutError: When the question is not found, or the target maps to no token.

        Examples:
            >>> from PIL import Image
            >>> from hooked_mllm import Box, HookedMLLM
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> image, target = Image.new("RGB", (96, 96)), Box(0, 0, 16, 16)
            >>> sample = model.prepare("what color is the star ?", images=image, target=target)
            >>> int(sample.mask("target").sum())
            1
        """
        preparer: Any = self._preparer
        return preparer(question, images, videos, **options)

    def resolve(self, inputs: RunInput) -> ResolvedInput:
        """Check model inputs of any accepted kind and move them to the model's device."""
        if isinstance(inputs, Mapping):
            check_arguments(self.hf_model, set(inputs) - processor_outputs(self.processor))
        return resolve_input(inputs, self.family, self.hf_model.config, self.device)

    # -- measuring -------------------------------------------------------------------------------------------------

    @overload
    def measure(
        self,
        samples: ModelInput | Iterable[ModelInput],
        metrics: Metric[AttentionView, Result],
        *,
        checkpoint: str | PathLike[str] | None = None,
        save_every: int = 20,
        progress: bool = True,
    ) -> Result: ...

    @overload
    def measure(
        self,
        samples: ModelInput | Iterable[ModelInput],
        metrics: Sequence[Metric[AttentionView, Result]],
        *,
        checkpoint: str | PathLike[str] | None = None,
        save_every: int = 20,
        progress: bool = True,
    ) -> list[Result]: ...

    def measure(
        self,
        samples: ModelInput | Iterable[ModelInput],
        metrics: Any,  # checked by `measure`
        *,
        checkpoint: str | PathLike[str] | None = None,
        save_every: int = 20,
        progress: bool = True,
    ) -> Any:
        """Score attention heads: one forward pass per sample, without logits; all metrics share its attention rows.

        The model keeps its fast attention; only the rows that a metric reads are computed, in float32. Under
        `torch.distributed`, pass each process its own samples: results are summed over processes.

        Args:
            samples: Samples, batches or mappings; one, a list, or an iterator that makes them as they are needed.
            metrics: A metric, which returns its result, mostly `HeadScores`; or several, which return a list.
            checkpoint: A file to which the state is saved every `save_every` samples and on an interrupt. A later call
                resumes there, if samples, metrics, model, attention, hooks and library versions are the same.
            save_every: Samples between two saves.
            progress: Show a progress bar.

        Raises:
            InputError: When there is no sample, or one lacks tokens that a metric reads, such as a target.
            NumericsError: When attention is not finite, as after an overflow in float16.
            CacheFileError: For the checkpoint of another run.

        Examples:
            >>> from hooked_mllm import HookedMLLM, metrics, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> samples = toys.VisualRetrieval(pages=1).samples(model, 2)
            >>> scores = model.measure(samples, metrics.RetrievalAttentionMass(), progress=False)
        """
        return measure(self, samples, metrics, checkpoint=checkpoint, save_every=save_every, progress=progress)

    # -- other tools -----------------------------------------------------------------------------------------------

    @cached_property
    def nnsight(self) -> Any:
        """The same module object as an nnsight object, with this package's names inside a trace; see `NNsightModel`.

        nnsight is imported on first use. It adds a method `save` to every Python object, with which some packages
        cannot be imported: import everything else before.
        """
        try:
            from hooked_mllm.model.nnsight_bridge import NNsightModel
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "nnsight":
                raise
            message = "model.nnsight needs nnsight, which is not installed: pip install 'nnsight>=0.8'."
            raise InputError(message) from error
        return NNsightModel(self)

    def check(self) -> None:
        """Verify the wiring on a small input, with an image where there is a processor.

        Hooked logits equal plain ones bit for bit; every hook point fires; patterns sum to one, and pattern times v
        equals z; what heads write sums to the attention output; the layout and the model count the same visual tokens.
        `UnsupportedModelError` names a failed check.
        """
        self_check(self)
