"""A run with cached activations: which ones, from the arguments of `run_with_cache`; `capture.py` caches them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hooked_mllm.cache.activation_cache import ActivationCache
from hooked_mllm.cache.capture import Capture, CaptureOptions
from hooked_mllm.cache.generation import GenerationCache
from hooked_mllm.cache.lazy import Entry
from hooked_mllm.cache.sequence import Span
from hooked_mllm.checks import as_device
from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError, InputError, LayoutError
from hooked_mllm.families.base import Rows
from hooked_mllm.hooks.registry import NameFilter
from hooked_mllm.hooks.table import is_quadratic
from hooked_mllm.inputs.positions import KindMasks, MappingMasks, Positions, TokenKind
from hooked_mllm.inputs.resolve import ResolvedInput

#: generation options under which the keys of a step do not simply extend those of the step before
_REORDERS = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "cache_implementation",
    "past_key_values",
)


@dataclass
class CacheRequest:
    """The arguments of `HookedMLLM.run_with_cache`."""

    names_filter: NameFilter = None
    device: torch.device | str | None = None
    incl_bwd: bool | Callable[[Tensor], Tensor] = False
    stop_at_layer: int | None = None
    queries: Any = None
    keys: Any = None
    return_logits: bool = True
    generate: Mapping[str, Any] | None = None
    pos_slice: Any = None
    remove_batch_dim: bool = False
    forward: dict[str, Any] = field(default_factory=dict)

    def validate(self) -> None:
        """Raise for options that exclude each other."""
        clashes = [
            (self.incl_bwd and self.stop_at_layer is not None, "incl_bwd", "stop_at_layer"),
            (self.incl_bwd and self.generate is not None, "incl_bwd", "generate"),
            (self.incl_bwd and not self.return_logits, "incl_bwd", "return_logits=False"),
            (self.generate is not None and self.stop_at_layer is not None, "generate", "stop_at_layer"),
            (self.generate is not None and self.remove_batch_dim, "generate", "remove_batch_dim"),
        ]
        for clash, a, b in clashes:
            if clash:
                raise HookValueError(f"`{a}` and `{b}` exclude each other: choose one.")


def cached_forward(model: Model, inputs: ResolvedInput, request: CacheRequest) -> tuple[Tensor | None, ActivationCache]:
    """What `model.run` returns (None without logits), or the loss with `incl_bwd`; and the cache."""
    output, capture, cache_of = _captured(model, inputs, request)
    cache = cache_of(0, capture.gradient_entries())
    return output, cache.remove_batch_dim() if request.remove_batch_dim else cache


def cached_generation(
    model: Model, inputs: ResolvedInput, request: CacheRequest
) -> tuple[Tensor | ModelOutput, GenerationCache]:
    """What `model.generate` returns, and the cache of every step."""
    output, capture, cache_of = _captured(model, inputs, request)
    return output, GenerationCache([cache_of(step, {}) for step in sorted(capture.steps)])


def _captured(
    model: Model, inputs: ResolvedInput, request: CacheRequest
) -> tuple[Any, Capture, Callable[[int, dict[str, Entry]], ActivationCache]]:
    """The output of a run, its captured activations, and a constructor of the cache of one step."""
    request.validate()
    if request.remove_batch_dim and inputs.batch != 1:
        raise HookValueError(f"remove_batch_dim needs a batch of one; this one has {inputs.batch}.")
    points = model.registry.select(request.names_filter)
    gradients = points if request.incl_bwd else []
    if request.names_filter is None:
        gradients = [p for p in gradients if not is_quadratic(p.name) and not p.name.endswith("hook_result")]
    generates = request.generate is not None
    reorders = generates and _reorders(model.hf_model.generation_config, request.generate or {})
    arguments = {**inputs.tensors, **request.forward, **(request.generate or {})}
    span = _prompt_span(inputs, arguments, generates)
    masks = _masks(model, inputs, span, request.forward.get("prompt_length"))

    def index(selected: Positions | None, as_rows: bool = True) -> Tensor | None:
        if selected is None:
            return None
        if span == Span(0, inputs.length):
            return inputs.positions(selected)
        return (span.queries if as_rows else span.keys)(selected, inputs.batch, masks)

    options = CaptureOptions(
        points=points,
        gradients=gradients,
        device=None if request.device is None else as_device(request.device),
        positions=index(position_range(request.pos_slice)),
        queries=index(request.queries),
        keys=index(request.keys, as_rows=False),
        growing=generates and not reorders,
        # a KV cache of fixed size is written in place by later calls
        copy=reorders
        or getattr(arguments.get("past_key_values"), "is_compileable", False)
        or any(p.may_edit for p in model.registry.registered),
        packed_vision=model.family.vision.packed,
        first=span.first,
        stop=span.stop,
        known=span.known,
        generates=generates,
        last_logits=_last_logits(arguments) if generates else 0,
    )
    with Capture(model.wiring, options) as capture:
        output = _run(model, inputs, request)

    vision_rows = _vision_rows(model, inputs)  # computed on first use: it may synchronise with the device

    def cache_of(step: int, more: dict[str, Entry]) -> ActivationCache:
        positions = options.positions if step == 0 else None
        queries = options.queries if step == 0 else None
        return ActivationCache(
            {**capture.entries(step), **more},
            {"text": model.cfg.n_layers, "vision": model.cfg.vision_n_layers},
            masks=masks,
            model=model,
            query_positions=positions if queries is None else queries,
            key_positions=options.keys,
            vision_rows=vision_rows,
            packed_vision=options.packed_vision,
            span=capture.span(step),
            kept_positions=positions,
        )

    return output, capture, cache_of


def _prompt_span(inputs: ResolvedInput, arguments: Mapping[str, Any], generates: bool) -> Span:
    """The positions of the prompt that a run computes; those before are in a KV cache."""
    past: Any = arguments.get("past_key_values")
    first = int(past.get_seq_length()) if hasattr(past, "get_seq_length") else 0  # others fail in transformers
    attention = arguments.get("attention_mask")
    if not first:
        return Span(0, inputs.length)
    if generates and (attention is None or attention.shape[-1] == inputs.length > first):
        return Span(first, inputs.length)  # the whole sequence, of which transformers runs the end
    return Span(first, first + inputs.length, known=first)


def _masks(model: Model, inputs: ResolvedInput, span: Span, prompt_length: int | None) -> KindMasks:
    """The token kinds of the inputs, for their cache."""

    def masks(kind: TokenKind) -> Tensor:
        if kind == "last" and prompt_length is not None and span.stop < prompt_length:
            raise LayoutError(
                f"The last position of the prompt is {prompt_length - 1}, and these inputs end at {span.stop - 1}: "
                "give the position as an index."
            )
        if kind == "visual":  # from the token ids: a prompt without images is no error for the residual stream
            return MappingMasks(inputs.tensors, model.family, model.hf_model.config)(kind)
        return inputs.masks(kind)

    return masks


def _last_logits(arguments: Mapping[str, Any]) -> int:
    """How many last positions of a prompt `generate` computes logits of; 0 for all."""
    count = arguments.get("logits_to_keep", 1)
    return count if isinstance(count, int) else 0


def position_range(selected: object) -> Any:
    """`pos_slice` as positions: two numbers in a tuple are a range, as in TransformerLens; a list is indices."""
    if not isinstance(selected, tuple) or any(isinstance(n, bool) or not isinstance(n, Integral) for n in selected):
        return selected
    if len(selected) in (1, 3):
        raise HookValueError(
            f"pos_slice={selected} is a range in TransformerLens, and elsewhere indices: write slice{selected} for the "
            f"range or {list(selected)} for the indices. A range may also be a tuple of two, (start, stop)."
        )
    return slice(*selected) if len(selected) == 2 else selected


def _vision_rows(model: Model, inputs: ResolvedInput) -> Callable[[], list[Rows] | None]:
    """The rows of vision activations that belong to each sample; None where the inputs do not determine them."""
    # pixels are needed for their shape only; the cache must not keep them in memory
    known = {
        name: torch.empty(value.shape, device="meta") if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in inputs.tensors.items()
    }

    def rows() -> list[Rows] | None:
        try:
            return None if known.get("input_ids") is None else model.family.vision_rows(known, model.hf_model.config)
        except InputError:
            return None

    return rows


def _reorders(defaults: object, options: Mapping[str, Any]) -> bool:
    """Whether a generation does more with its keys than append those of each step."""
    config = options.get("generation_config", defaults)

    def option(name: str) -> Any:
        return options.get(name, getattr(config, name, None))

    if option("use_cache") is False:
        raise HookValueError(
            "Without a KV cache (use_cache=False) every step of a generation runs the whole sequence, so that its "
            "activations are not those of one step. Leave use_cache on, or run the finished sequence once."
        )
    beams = option("num_beams")
    return (isinstance(beams, Integral) and int(beams) > 1) or any(option(name) is not None for name in _REORDERS)


def _run(model: Model, inputs: ResolvedInput, request: CacheRequest) -> Any:
    if request.generate is not None:
        with torch.no_grad():
            return model.run_generate(inputs, **{**request.forward, **request.generate})
    if not request.incl_bwd:
        kind = "logits" if request.return_logits else None
        return model.run(inputs, kind, request.stop_at_layer, **request.forward)
    with frozen_parameters(model), torch.enable_grad():
        if callable(request.incl_bwd):
            output = model.run(inputs, "logits", **request.forward)
            scalar = request.incl_bwd(output)
            if not isinstance(scalar, Tensor) or scalar.numel() != 1:
                got = tuple(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
                raise HookValueError(f"The function passed as `incl_bwd` must map the logits to one number; got {got}.")
        else:
            output = scalar = model.run(inputs, "loss", **request.forward)
        if not scalar.requires_grad:
            raise HookValueError("The output depends on no cached activation, so there is no gradient to cache.")
        scalar.backward()
    return output.detach()


@contextmanager
def frozen_parameters(model: Model) -> Iterator[None]:
    """Freeze parameters: only gradients of activations are needed, and `.grad` of the model must not change."""
    with model.registry.context.lock:  # other threads run with the parameters as they are
        trained = [p for p in model.hf_model.parameters() if p.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
