"""A run with cached activations: which ones, from the arguments of `run_with_cache`; `capture.py` caches them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hooked_mllm.cache.activation_cache import ActivationCache
from hooked_mllm.cache.capture import Capture, CaptureOptions
from hooked_mllm.cache.generation import GenerationCache
from hooked_mllm.cache.lazy import Entry
from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError, InputError
from hooked_mllm.families.base import Rows
from hooked_mllm.hooks.registry import NameFilter
from hooked_mllm.hooks.table import is_quadratic
from hooked_mllm.inputs.positions import MappingMasks, Positions, TokenKind
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
    cache = cache_of({**capture.entries(0), **capture.gradient_entries()})
    return output, cache.remove_batch_dim() if request.remove_batch_dim else cache


def cached_generation(
    model: Model, inputs: ResolvedInput, request: CacheRequest
) -> tuple[Tensor | ModelOutput, GenerationCache]:
    """What `model.generate` returns, and the cache of every step."""
    output, capture, cache_of = _captured(model, inputs, request)
    caches = [cache_of(capture.entries(step)) for step in sorted(capture.steps)]
    for decoding_step in caches[1:]:
        decoding_step.query_positions = None
    return output, GenerationCache(caches)


def _captured(
    model: Model, inputs: ResolvedInput, request: CacheRequest
) -> tuple[Any, Capture, Callable[[dict[str, Entry]], ActivationCache]]:
    """The output of a run, its captured activations, and a constructor of its caches."""
    request.validate()
    if request.remove_batch_dim and inputs.batch != 1:
        raise HookValueError(f"remove_batch_dim needs a batch of one; this one has {inputs.batch}.")
    points = model.registry.select(request.names_filter)
    gradients = points if request.incl_bwd else []
    if request.names_filter is None:
        gradients = [p for p in gradients if not is_quadratic(p.name) and not p.name.endswith("hook_result")]
    reorders = request.generate is not None and _reorders(model.hf_model.generation_config, request.generate)

    def index(selected: Positions | None) -> Tensor | None:
        return None if selected is None else inputs.positions(selected)

    options = CaptureOptions(
        points=points,
        gradients=gradients,
        device=request.device,
        positions=index(request.pos_slice),
        queries=index(request.queries),
        keys=index(request.keys),
        growing=request.generate is not None and not reorders,
        copy=reorders or any(p.may_edit for p in model.registry.hook_dict.values()),
        packed_vision=model.family.vision.packed,
    )
    with Capture(model.wiring, options) as capture:
        output = _run(model, inputs, request)

    def masks(kind: TokenKind) -> Tensor:
        if kind == "visual":  # from the token ids: a prompt without images is no error for the residual stream
            return MappingMasks(inputs.tensors, model.family, model.hf_model.config)(kind)
        return inputs.masks(kind)

    def cache_of(entries: dict[str, Entry]) -> ActivationCache:
        return ActivationCache(
            entries,
            {"text": model.cfg.n_layers, "vision": model.cfg.vision_n_layers},
            masks=masks,
            model=model,
            query_positions=options.queries if options.queries is not None else options.positions,
            key_positions=options.keys,
            vision_rows=_vision_rows(model, inputs),  # computed on first use: it may synchronise with the device
            packed_vision=options.packed_vision,
        )

    return output, capture, cache_of


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


def _reorders(defaults: Any, options: Mapping[str, Any]) -> bool:
    """Whether a generation does more with its keys than append those of each step."""
    config = options.get("generation_config", defaults)

    def option(name: str) -> Any:
        return options.get(name, getattr(config, name, None))

    if option("use_cache") is False:
        raise HookValueError(
            "Without a KV cache (use_cache=False) every step of a generation runs the whole sequence, so that its "
            "activations are not those of one step. Leave use_cache on, or run the finished sequence once."
        )
    return (option("num_beams") or 1) > 1 or any(option(name) is not None for name in _REORDERS)


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
