"""Runs a model with its activations kept: what to keep is worked out here, the keeping itself is `capture.py`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hooked_mllm.cache.activation_cache import ActivationCache
from hooked_mllm.cache.capture import QUADRATIC, Capture, CaptureOptions
from hooked_mllm.cache.generation import GenerationCache
from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError, InputError
from hooked_mllm.families.base import Rows
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.registry import NameFilter
from hooked_mllm.inputs.positions import MappingMasks, Positions, TokenKind
from hooked_mllm.inputs.resolve import ResolvedInput

#: generation options under which one step's keys are not simply those of the step before and some more
_REORDERS = (
    "assistant_model",
    "assistant_early_exit",
    "prompt_lookup_num_tokens",
    "cache_implementation",
    "past_key_values",
)


@dataclass
class CacheRequest:
    """The arguments of `run_with_cache`; see there."""

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
        """Refuse options that exclude each other."""
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


def run_cached(model: Model, inputs: ResolvedInput, request: CacheRequest) -> tuple[Any, Any]:
    """Run `model` (a HookedMLLM) as `request` says; returns the output and the cache."""
    request.validate()
    if request.remove_batch_dim and inputs.batch != 1:
        raise HookValueError(f"remove_batch_dim needs a batch of one; this one has {inputs.batch}.")
    points = model.registry.select(request.names_filter)

    reorders = request.generate is not None and _reorders(model.hf_model.generation_config, request.generate)

    def index(selected: Positions | None) -> Tensor | None:
        return None if selected is None else inputs.positions(selected)

    options = CaptureOptions(
        points=points,
        gradients=_gradient_points(points, request),
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
        if kind == "visual":  # from the tokens: a text alone has none, which is no error for the residual stream
            return MappingMasks(inputs.tensors, model.family, model.hf_model.config)(kind)
        return inputs.masks(kind)

    def cache_of(entries: dict[str, Any]) -> ActivationCache:
        return ActivationCache(
            entries,
            {"text": model.cfg.n_layers, "vision": model.cfg.vision_n_layers},
            masks=masks,
            model=model,
            query_positions=options.queries if options.queries is not None else options.positions,
            key_positions=options.keys,
            vision_rows=_vision_rows(model, inputs),  # worked out only when asked for: it may wait for the device
            packed_vision=options.packed_vision,
        )

    if request.generate is not None:
        caches = [cache_of(capture.entries(step)) for step in sorted(capture.steps)]
        for later in caches[1:]:
            later.query_positions = None
        return output, GenerationCache(caches)
    cache = cache_of({**capture.entries(0), **capture.gradient_entries()})
    return output, cache.remove_batch_dim() if request.remove_batch_dim else cache


def _vision_rows(model: Model, inputs: ResolvedInput) -> Callable[[], list[Rows] | None]:
    """Whose images the vision tower's rows are; None where the inputs do not tell."""

    def sketch(value: Any) -> Any:  # of pixels the shape is enough; the cache must not keep them alive
        pixels = isinstance(value, Tensor) and value.is_floating_point()
        return torch.empty(value.shape, device="meta") if pixels else value

    known = {name: sketch(value) for name, value in inputs.tensors.items()}

    def rows() -> list[Rows] | None:
        try:
            return None if known.get("input_ids") is None else model.family.vision_rows(known, model.hf_model.config)
        except InputError:
            return None

    return rows


def _reorders(defaults: Any, options: Mapping[str, Any]) -> bool:
    """Whether a generation does more with its keys than add each step's to those before.

    Raises:
        HookValueError: for a generation without a KV cache, whose steps run the whole sequence anew.
    """
    given = options.get("generation_config", defaults)

    def option(name: str) -> Any:
        return options.get(name, getattr(given, name, None))

    if option("use_cache") is False:
        raise HookValueError(
            "Without a KV cache (use_cache=False) every step of a generation runs the whole sequence anew, so that its "
            "activations are not those of one step. Leave use_cache on, or run the finished sequence once."
        )
    return (option("num_beams") or 1) > 1 or any(option(name) is not None for name in _REORDERS)


def _gradient_points(points: list[HookPoint], request: CacheRequest) -> list[HookPoint]:
    if not request.incl_bwd:
        return []
    if request.names_filter is None:
        return [p for p in points if not p.name.endswith((*QUADRATIC, "hook_result"))]
    return points


def _run(model: Model, inputs: ResolvedInput, request: CacheRequest) -> Any:
    if request.generate is not None:
        with torch.no_grad():
            return model.run_generate(inputs, **{**request.forward, **request.generate})
    if not request.incl_bwd:
        kind = "logits" if request.return_logits else None
        return model.run(inputs, kind, request.stop_at_layer, **request.forward)
    with frozen_parameters(model.hf_model), torch.enable_grad():
        if callable(request.incl_bwd):
            output = model.run(inputs, "logits", **request.forward)
            scalar = request.incl_bwd(output)
            if not isinstance(scalar, Tensor) or scalar.numel() != 1:
                got = tuple(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__
                raise HookValueError(f"The function given as `incl_bwd` must make one number of the logits; got {got}.")
        else:
            output = scalar = model.run(inputs, "loss", **request.forward)
        if not scalar.requires_grad:
            raise HookValueError("No cached activation reaches the output, so there is no gradient to keep.")
        scalar.backward()
    return output.detach()


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters: those of activations are wanted, and `.grad` of the user's model stays as it is."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
