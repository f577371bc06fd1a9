"""HookedMLLM: a multimodal language model of transformers with every activation named."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hooked_mllm.attention.backends import AttentionBackend
from hooked_mllm.contracts import Metric, ModelInfo
from hooked_mllm.errors import InputError, UnsupportedModelError
from hooked_mllm.families.config import HookedConfig
from hooked_mllm.families.registry import family_of
from hooked_mllm.inputs.preparer import Preparer
from hooked_mllm.inputs.resolve import ModelInput, ResolvedInput, resolve_input
from hooked_mllm.measuring.measure import measure
from hooked_mllm.model.attention_methods import AttentionMethods, split_attention
from hooked_mllm.model.hook_methods import HookMethods
from hooked_mllm.model.loading import load_model
from hooked_mllm.model.run_methods import RunMethods
from hooked_mllm.model.self_check import self_check
from hooked_mllm.model.vision_methods import VisionMethods
from hooked_mllm.version import __version__
from hooked_mllm.wiring import wire


class HookedMLLM(RunMethods, HookMethods, AttentionMethods, VisionMethods):
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
        attention: str | AttentionBackend | Mapping[str, str | AttentionBackend] | None = None,
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
            attention: A transformers implementation ("sdpa", "eager", ...) for both towers; a backend, such as
                `HybridAttention(...)` or your own, for the language model; or a mapping of "text" and "vision" to
                either.
            check: Verify the wiring on a small input (see `check`).
            **kwargs: For transformers' `from_pretrained`.

        Raises:
            InputError: when there is no such checkpoint, it is damaged, or arguments contradict each other.
            UnsupportedModelError: for another kind of model, or one that needs code of its own.
        """
        named, backends = split_attention(attention)
        hf_model, processor = load_model(path_or_id, dtype, device, device_map, revision, named, **kwargs)
        model = cls(hf_model, processor, name=str(path_or_id), revision=revision, check=check)
        for tower, backend in backends.items():
            model._set_backend(model._fitting(backend, tower), tower)
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
            attention=self._attention_name(),
            attention_settings=self._attention_settings(),
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

        Examples:
            >>> from PIL import Image
            >>> from hooked_mllm import Box, HookedMLLM
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> image, target = Image.new("RGB", (96, 96)), Box(0, 0, 16, 16)
            >>> sample = model.prepare("what color is the star ?", images=image, target=target)
            >>> int(sample.mask("target").sum())
            1
        """
        return self._preparer(question, images, videos, **options)

    def resolve(self, inputs: ModelInput) -> ResolvedInput:
        """Check inputs of any accepted kind and bring them to the model's device."""
        return resolve_input(inputs, self.family, self.hf_model.config, self.device)

    # -- measuring -------------------------------------------------------------------------------------------------

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
                with the same samples, metrics and file goes on where that one stopped. It must be the same model, with
                the same attention, interventions, hooks and library versions.
            save_every: Samples between two savings.
            progress: Show a progress bar.

        Returns:
            What the metric computes, mostly `HeadScores`; a list of as many for several metrics.

        Raises:
            InputError: when a metric needs what a sample lacks, such as a target, or there is no sample.
            NumericsError: when attention is not finite, as after an overflow in float16.
            CacheFileError: for the checkpoint of another run.

        Examples:
            >>> from hooked_mllm import HookedMLLM, metrics, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> samples = toys.VisualRetrieval(pages=1).samples(model, 2)
            >>> ram, mass = model.measure(
            ...     samples, [metrics.RetrievalAttentionMass(), metrics.VisionMass()], progress=False
            ... )
        """
        return measure(self, samples, metrics, checkpoint=checkpoint, save_every=save_every, progress=progress)

    # -- other tools -----------------------------------------------------------------------------------------------

    @cached_property
    def nnsight(self) -> Any:
        """The same module object as an nnsight object, with this package's names inside a trace; see `NNsightModel`.

        nnsight is imported on first use. It gives every Python object a method `save`, which some packages do not bear
        while they are imported: import everything else first.

        Raises:
            InputError: when nnsight is not installed.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> with model.nnsight.trace(sample):
            ...     z = model.nnsight["blocks.3.attn.hook_z"].save()
        """
        try:
            from hooked_mllm.model.nnsight_bridge import NNsightModel
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] != "nnsight":
                raise
            raise InputError(
                "model.nnsight needs nnsight, which is not installed: pip install 'nnsight>=0.8'."
            ) from error
        return NNsightModel(self)

    # -- trust -----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Verify the wiring on a small input, with an image where there is a processor.

        Checked: every part is there; hooked logits equal plain ones bit for bit; every hook point fires; patterns sum
        to one and give z back; the layout counts as many visual tokens as the model.

        Raises:
            UnsupportedModelError: naming what failed.
        """
        self_check(self)
