"""Several questions about the same images: the shared tokens before the question run once, and their keys are kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.site import AttentionCall
from hooked_mllm.contracts import Model
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.inputs.sample import Sample, SampleBatch, is_per_token, moved


@dataclass(frozen=True, eq=False, repr=False)
class SharedPrefix(SampleBatch):
    """Samples that are equal up to their questions, padded on the right so that positions correspond.

    `model.measure` runs the first sample whole, and of the others only the positions after `prefix`, against the cached
    keys and values of the first (see `reasons_to_run_whole`). Everywhere else this is an ordinary batch.

    Attributes:
        prefix: Number of shared positions; 0 if none can be shared, and the batch is then run whole.

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> other = metrics.NullQuery("what color is the star ?").sample(model, sample)
        >>> batch = SharedPrefix.collate([sample, other])
        >>> batch.prefix == sample.layout.spans("question")[0][0]
        True
    """

    prefix: int = field(default=0, kw_only=True)

    @classmethod
    def collate(cls, samples: Sequence[Sample], padding_side: str = "right") -> "SharedPrefix":
        """Join samples of one model; padded on the left, they share no prefix.

        Raises:
            InputError: For an empty batch, an unknown side, or images that the model cannot take in one batch.
        """
        batch = super().collate(samples, padding_side)
        return replace(batch, prefix=common_prefix(batch.samples) if padding_side == "right" else 0)  # type: ignore[return-value]

    def resolved(self, device: torch.device | str | None) -> ResolvedInput:
        """The batch without its pixels, which only the run of the first sample needs."""
        tensors = moved({"input_ids": self.inputs["input_ids"]}, device)
        return ResolvedInput(tensors, self.mask, tuple(s.id for s in self), self)


def common_prefix(samples: Sequence[Sample]) -> int:
    """Number of positions that all samples share before their questions; 0 if pixels or later visual tokens differ."""
    first, width = samples[0], min(map(len, samples))
    shared = torch.ones(width, dtype=torch.bool)
    for sample in samples:
        if sample.inputs.keys() != first.inputs.keys():
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

    A user's hook or backend would get other shapes in a run of the suffix only, so that its result could differ. A
    metric must list in its attribute `queries` the rows that it reads, because only rows after the prefix exist, and
    must not read the residual stream.
    """
    reasons = [] if batch.prefix else ["the samples share no prefix before their questions"]
    config = model.family.text_config(model.hf_model.config)
    if not model.family.text.causal or {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}:
        reasons.append("not every layer attends to all earlier positions")
    if model.hf_model.training:
        reasons.append("the model is in training mode")
    if any(point.active for point in model.hook_dict.values()):
        reasons.append("hooks or interventions are registered on the model")
    sites = (*model.wiring.text, *model.wiring.vision)
    if any(site.running is not None or site.taps for site in sites):
        reasons.append("an attention backend or a tap is in use")
    if any(_is_foreign(fn) for module in model.hf_model.modules() for fn in _torch_hooks(module)):
        reasons.append("torch hooks are registered on the model")
    for metric in metrics:
        queries = getattr(metric, "queries", None)
        if getattr(metric, "needs_residual", False) or not isinstance(queries, str):
            reasons.append(f"{metric!r} may read rows before the question")
        elif bool(batch.mask(queries)[:, : batch.prefix].any()):
            reasons.append(f"{metric!r} reads rows of {queries!r}, some of which are before the question")
    return reasons


def _torch_hooks(module: nn.Module) -> Iterator[Callable[..., Any]]:
    yield from module._forward_pre_hooks.values()
    yield from module._forward_hooks.values()


def _is_foreign(fn: Callable[..., Any]) -> bool:
    """Whether a torch hook belongs neither to transformers, which records outputs, nor to this package."""
    return not (getattr(fn, "__module__", None) or "").startswith(("transformers.", "hooked_mllm."))


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
        for row, (some_q, some_k) in enumerate(parts):
            q[row, :, : some_q.shape[2]] = some_q[0]
            k[row, :, self.prefix : self.prefix + some_k.shape[2]] = some_k[0]
        # padding is on the right of all queries, where the causal mask hides it
        mask = MaskRows(len(parts), width, k.shape[2], k.device, causal=True)
        return replace(call, q=q, k=k, mask=mask)


@torch.no_grad()
def run_shared(model: Model, batch: SharedPrefix, collect: Callable[[AttentionCall], None]) -> None:
    """Run the batch with its prefix once; `collect` gets the attention call of each layer as of the whole batch.

    Kept in memory are the keys of one layer of the whole batch, the keys and values of one sample, and the queries and
    keys of the suffixes.
    """
    held, cache = _Held(batch.prefix), DynamicCache()
    model.family.reset(model.hf_model)
    first_position: Tensor | None = None

    def collect_joined(call: AttentionCall) -> None:
        collect(held.join(call))

    for number, sample in enumerate(batch):
        held.suffixes.append({})
        with _tapping(model, collect_joined if number == len(batch) - 1 else held.keep):
            if number == 0:
                tensors = {k: v for k, v in moved(sample.inputs, model.device).items() if k != "labels"}
                with _positions(model) as seen:
                    model.hf_model.model(**tensors, use_cache=True, past_key_values=cache)
                # after the prefix, text positions count up by one in every sample, on each rotary axis
                if seen[0] is not None:
                    first_position = seen[0][..., batch.prefix : batch.prefix + 1]
            else:
                cache.crop(batch.prefix - cache.get_seq_length())
                tokens = sample.inputs["input_ids"][:, batch.prefix :].to(model.device)
                more: dict[str, Any] = {"attention_mask": torch.ones(1, len(sample), device=model.device).long()}
                if first_position is not None:
                    more["position_ids"] = first_position + torch.arange(tokens.shape[1], device=first_position.device)
                model.hf_model.model(input_ids=tokens, use_cache=True, past_key_values=cache, **more)


@contextmanager
def _tapping(model: Model, tap: Callable[[AttentionCall], None]) -> Iterator[None]:
    sites = list(model.wiring.text)
    try:
        for site in sites:
            site.add_tap(tap)
        yield
    finally:
        for site in sites:
            site.remove_tap(tap)


@contextmanager
def _positions(model: Model) -> Iterator[list[Tensor | None]]:
    """Record the position ids of every call of the language model in the body of a `with`."""
    seen: list[Tensor | None] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs.get("position_ids"))

    language_model = model.hf_model.get_submodule(model.family.language_model)
    handle = language_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
