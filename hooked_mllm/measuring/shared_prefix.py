"""Several questions about the same images: the shared tokens before the question run once, and their keys are kept."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.site import AttentionCall
from hooked_mllm.contracts import Model
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.inputs.sample import Sample, SampleBatch, is_per_token, moved

#: modules whose torch hooks work on a run of the suffix too
_OWN_HOOKS = ("transformers.", "hooked_mllm.")


@dataclass(frozen=True, eq=False, repr=False)
class SharedPrefix(SampleBatch):
    """Samples that are equal up to their questions, padded on the right so that positions correspond.

    `model.measure` runs the first sample whole, and of the others only the positions after `prefix`, against the cached
    keys and values of the first (see `reasons_to_run_whole`). If `prefix` is 0, the batch is run whole.
    """

    prefix: int = field(default=0, kw_only=True)

    @classmethod
    def collate(cls, samples: Iterable[Sample], padding_side: str = "right") -> "SharedPrefix":
        """Join samples of one model; padded on the left, they share no prefix."""
        batch = super().collate(samples, padding_side)
        return replace(batch, prefix=common_prefix(batch.samples) if padding_side == "right" else 0)  # type: ignore[return-value]

    def resolved(self, device: torch.device | str | None) -> ResolvedInput:
        """The batch without its pixels, which only the run of the first sample needs."""
        tensors = moved({"input_ids": self.inputs["input_ids"]}, device)
        return ResolvedInput(tensors, self.mask, tuple(s.id for s in self), self)


def common_prefix(samples: Sequence[Sample]) -> int:
    """Number of positions that all samples share before their questions.

    It is 0 if pixels or later visual tokens differ, and for samples with padding.
    """
    first, width = samples[0], min(map(len, samples))
    shared = torch.ones(width, dtype=torch.bool)
    for sample in samples:
        if sample.inputs.keys() != first.inputs.keys() or bool(sample.layout.padding.any()):
            return 0
        for name, value in sample.inputs.items():
            other = first.inputs[name]
            if is_per_token(value, len(sample)):
                shared &= (value[0, :width] == other[0, :width]).cpu()
            elif value is not other and not torch.equal(value, other):
                return 0
        question = sample.layout.question[:width]
        shared &= question.cumsum(0) == 0
        shared &= torch.arange(width) < len(sample) - 1  # something must be left to run
    length = int(shared.long().cumprod(0).sum())
    return 0 if any(bool(s.layout.visual[length:].any()) for s in samples) else length


def reasons_to_run_whole(model: Model, batch: SharedPrefix, metrics: Sequence[Any]) -> list[str]:
    """The reasons why `model.measure` would run this batch whole; empty if the prefix is run once.

    Hooks and backends would get other shapes in a run of the suffix only. Only rows after the prefix exist, so that a
    metric must list those that it reads in its attribute `queries`.
    """
    reasons = [] if batch.prefix else ["the samples share no prefix before their questions"]
    config = model.family.text_config(model.hf_model.config)
    if not model.family.text.causal or {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}:
        reasons.append("not every layer attends to all earlier positions")
    if model.hf_model.training:
        reasons.append("the model is in training mode")
    if model.registry.in_use:
        reasons.append("hooks or interventions are registered on the model")
    sites = (*model.wiring.text, *model.wiring.vision)
    if any(site.running is not None or site.taps for site in sites):
        reasons.append("an attention backend or a tap is in use")
    modules = model.hf_model.modules()
    torch_hooks = chain.from_iterable((*m._forward_pre_hooks.values(), *m._forward_hooks.values()) for m in modules)
    # transformers records outputs with hooks
    if not all((getattr(fn, "__module__", None) or "").startswith(_OWN_HOOKS) for fn in torch_hooks):
        reasons.append("torch hooks are registered on the model")
    for metric in metrics:
        queries = getattr(metric, "queries", None)
        if getattr(metric, "needs_residual", False) or not isinstance(queries, str):
            reasons.append(f"{metric!r} may read rows before the question")
        elif bool(batch.mask(queries)[:, : batch.prefix].any()):
            reasons.append(f"{metric!r} reads rows of {queries!r}, some of which are before the question")
    return reasons


class _Held:
    """The q and k of each sample's suffix, by layer: what its attention rows need besides the shared prefix."""

    def __init__(self, prefix: int) -> None:
        self.prefix = prefix
        self.suffixes: list[dict[int, tuple[Tensor, Tensor]]] = []

    def keep(self, call: AttentionCall) -> None:
        """Copy the suffix of a call, so that the rest can be freed."""
        start = self.prefix - (call.k.shape[2] - call.q.shape[2])
        self.suffixes[-1][call.layer] = (call.q[:, :, start:].clone(), call.k[:, :, self.prefix :].clone())

    def join(self, call: AttentionCall) -> AttentionCall:
        """The attention call of the whole batch, without the queries of the prefix."""
        self.keep(call)
        parts = [held.pop(call.layer) for held in self.suffixes]
        width = max(q.shape[2] for q, _ in parts)
        q = call.q.new_zeros(len(parts), call.q.shape[1], width, call.q.shape[3])
        k = call.k.new_zeros(len(parts), call.k.shape[1], self.prefix + width, call.k.shape[3])
        k[:, :, : self.prefix] = call.k[:, :, : self.prefix]
        for number, (suffix_q, suffix_k) in enumerate(parts):
            q[number, :, : suffix_q.shape[2]] = suffix_q[0]
            k[number, :, self.prefix : self.prefix + suffix_k.shape[2]] = suffix_k[0]
        # padding is on the right of all queries, where the causal mask hides it
        mask = MaskRows(len(parts), width, k.shape[2], k.device, causal=True)
        return replace(call, q=q, k=k, mask=mask)


@torch.no_grad()
def run_shared(model: Model, batch: SharedPrefix, collect: Callable[[AttentionCall], None]) -> None:
    """Run the batch with its prefix once; `collect` gets the attention call of each layer as of the whole batch."""
    held, cache = _Held(batch.prefix), DynamicCache()
    model.family.reset(model.hf_model)
    language_model = model.hf_model.get_submodule(model.family.language_model)
    position_ids: list[Tensor | None] = []

    def collect_joined(call: AttentionCall) -> None:
        collect(held.join(call))

    def keep_positions(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        position_ids.append(kwargs.get("position_ids"))

    for number, sample in enumerate(batch):
        held.suffixes.append({})
        tap = collect_joined if number == len(batch) - 1 else held.keep
        with tapping(model, tap), model.registry.running_on(None):
            if number == 0:
                tensors = {k: v for k, v in moved(sample.inputs, model.device).items() if k != "labels"}
                with language_model.register_forward_pre_hook(keep_positions, with_kwargs=True):
                    model.hf_model.model(**tensors, use_cache=True, past_key_values=cache)
            else:
                cache.crop(batch.prefix - cache.get_seq_length())
                tokens = sample.inputs["input_ids"][:, batch.prefix :].to(model.device)
                more: dict[str, Any] = {"attention_mask": torch.ones(1, len(sample), device=model.device).long()}
                if position_ids[0] is not None:
                    # after the prefix, text positions count up by one in every sample, on each rotary axis
                    start = position_ids[0][..., batch.prefix : batch.prefix + 1]
                    more["position_ids"] = start + torch.arange(tokens.shape[1], device=start.device)
                model.hf_model.model(input_ids=tokens, use_cache=True, past_key_values=cache, **more)


@contextmanager
def tapping(model: Model, tap: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Pass every attention call of the language model to `tap` in the body of a `with`."""
    sites, context = list(model.wiring.text), model.registry.context
    with context.scope(of_run=True) as scope:
        try:
            with context.registers_in(scope):
                for site in sites:
                    site.add_tap(tap)
            yield
        finally:
            for site in sites:
                site.remove_tap(tap)
