"""`model.measure`: one forward pass a sample, no logits; attention rows shared by the metrics, layers in groups."""

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.site import AttentionCall
from hooked_mllm.contracts import Metric, Model
from hooked_mllm.errors import CacheFileError, InputError
from hooked_mllm.heads import HeadScores
from hooked_mllm.hooks import HookPoint
from hooked_mllm.inputs.resolve import (
    ModelInput,
    ModelInputs,
    ResolvedInput,
    check_maker,
    each_sample,
    no_sample,
    sample_count,
    samples_of,
    tensors_of,
)
from hooked_mllm.measuring.attention_view import AttentionView
from hooked_mllm.measuring.checkpoint import MeasureCheckpoint, identity_of, sampled_bytes
from hooked_mllm.measuring.query_selection import QuerySelection, Selections
from hooked_mllm.measuring.shared_prefix import SharedPrefix, reasons_to_run_whole, run_shared, tapping
from hooked_mllm.measuring.view_context import ViewContext

#: q and k of this many bytes are held back before their rows are computed together
GROUP_BYTES = 1 << 27


class _Held(NamedTuple):
    """What a view needs of a layer: all of q, or its rows by the name of query tokens."""

    layer: int
    q: Tensor | None
    rows: dict[str, Tensor]
    k: Tensor
    mask: MaskRows
    scale: float
    first: int


def named_queries(metrics: Iterable[Any]) -> tuple[str, ...] | None:
    """The query tokens whose rows the metrics read, if all of them list these in an attribute `queries`."""
    names: dict[str, None] = {}
    for metric in metrics:
        queries = getattr(metric, "queries", None)
        named = (queries,) if isinstance(queries, str) else queries
        if not isinstance(named, tuple | list) or not all(isinstance(name, str) for name in named):
            return None
        names.update(dict.fromkeys(named))
    return tuple(names) or None


class _Collector:
    """Collects k and the rows of q that the metrics read, and passes those of several layers to them as one view."""

    def __init__(self, metrics: Sequence[Metric], n_layers: int, inputs: ResolvedInput, group_bytes: int) -> None:
        self.metrics, self.n_layers, self.inputs, self.group_bytes = metrics, n_layers, inputs, group_bytes
        self.names = named_queries(metrics)
        self.held: list[_Held] = []
        self.views: list[AttentionView] = []
        self._bytes = self._each = 0
        #: the residual stream entering a layer, where a metric reads it
        self.residual: dict[int, Tensor] = {}
        self._selections: dict[torch.device, Selections] = {}  # resolved once a sample, for they may wait for a device
        self._queries: list[tuple[str, QuerySelection]] | None = None

    def __call__(self, call: AttentionCall) -> None:
        if self.held and self.held[0].k.device != call.k.device:
            self.flush()
            self._queries = None
        q, k = call.q, call.k
        if q.requires_grad or k.requires_grad:  # hooks may turn gradients on
            q, k = q.detach(), k.detach()
        first = k.shape[2] - q.shape[2]
        if self._queries is None:
            selections = self._selected(k)
            self._queries = [(name, selections.queries(name)) for name in self.names or ()]
        rows = {name: s.take(q, slice(0, s.length), first).contiguous() for name, s in self._queries}
        self.held.append(_Held(call.layer, None if rows else q, rows, k, call.mask, call.scale, first))
        if len(self.held) == 1:  # the layers of one device are alike
            residual = self.residual.get(call.layer)
            parts = [k, *(rows.values() if rows else (q,)), *([] if residual is None else [residual])]
            self._each = sum(t.nbytes for t in parts)
        self._bytes += self._each
        if self._bytes >= self.group_bytes or call.layer == self.n_layers - 1:
            self.flush()

    def _selected(self, k: Tensor) -> Selections:
        if k.device not in self._selections:
            shape = (k.shape[0], k.shape[2])
            self._selections[k.device] = Selections(self.inputs.host_masks, shape, k.device)
        return self._selections[k.device]

    def flush(self) -> None:
        held, self.held, self._bytes = self.held, [], 0
        whole = [h.q for h in held if h.q is not None]
        tokens, device = self.inputs.tensors.get("input_ids"), held[0].k.device
        residual = [self.residual.pop(h.layer) for h in held] if self.residual else None
        view = AttentionView(
            [h.layer for h in held],
            whole or {name: [h.rows[name] for h in held] for name in held[0].rows},
            [h.k for h in held],
            [h.mask for h in held],
            [h.scale for h in held],
            self._selected(held[0].k),
            self.n_layers,
            context=ViewContext(None if tokens is None else tokens.to(device), self.inputs.layouts, residual),
            first=held[0].first,
        )
        for metric in self.metrics:
            metric.update(view=view)
        view.release()
        self.views.append(view)

    def keep_residual(self, value: Tensor, hook: HookPoint) -> None:
        """A hook on the residual stream."""
        self.residual[hook.layer()] = value.detach()


def _is_metric(value: object) -> bool:
    return isinstance(value, Metric) and not isinstance(value, type)  # a class has a metric's methods, too


def fingerprint(inputs: ModelInput) -> str:
    """A short name of an input's contents: its tokens and target, and its pixels at evenly spaced positions."""
    digest = hashlib.sha256()
    tensors = tensors_of(inputs)
    for name in sorted(tensors):
        value = tensors[name]
        if isinstance(value, Tensor):
            content = sampled_bytes(value) if value.is_floating_point() else value.cpu().numpy().tobytes()
            digest.update(f"{name}{tuple(value.shape)}".encode() + content)
    for sample in samples_of(inputs):
        if sample.target_mask is not None:
            digest.update(sample.target_mask.numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass
class _Facts:
    """The samples that were measured, for the provenance of results."""

    ids: list[str | int] = field(default_factory=list)
    templates: set[str] = field(default_factory=set)
    #: batches with a shared prefix, by whether it was run once
    prefixes: dict[str, int] = field(default_factory=lambda: {"reused": 0, "whole": 0})

    def add(self, inputs: ResolvedInput) -> None:
        self.ids += [name for name in inputs.ids if name is not None]
        self.templates |= {sample.template for sample in inputs.samples if sample.template}

    def provenance(self) -> dict[str, Any]:
        facts = {"sample_ids": self.ids, "templates": sorted(self.templates)}
        facts |= {"shared_prefix": self.prefixes} if any(self.prefixes.values()) else {}
        return {name: value for name, value in facts.items() if value}


def measure(
    model: Model,
    samples: ModelInputs,
    metrics: Metric | Sequence[Metric],
    *,
    checkpoint: str | PathLike[str] | None = None,
    save_every: int = 20,
    progress: bool = True,
    group_bytes: int = GROUP_BYTES,
) -> Any:
    """Score attention heads over samples; see `HookedMLLM.measure`."""
    if save_every < 1:
        raise InputError(f"save_every is a number of samples, at least 1; got {save_every}.")
    metric_list = _metric_list(metrics)
    with _reserved(metric_list):
        results = _measured(model, samples, metric_list, checkpoint, save_every, progress, group_bytes)
    return results[0] if _is_metric(metrics) else results


def _measured(
    model: Model,
    samples: ModelInputs,
    metric_list: list[Metric],
    checkpoint: str | PathLike[str] | None,
    save_every: int,
    progress: bool,
    group_bytes: int,
) -> list[Any]:
    sources, total = each_sample(samples), sample_count(samples)
    for metric in metric_list:
        metric.setup(model.info)
    state = MeasureCheckpoint(checkpoint, metric_list, {} if checkpoint is None else identity_of(model))
    state.load()
    measured, facts, count = list(state.done), _Facts(), 0
    pending: list[AttentionView] = []
    bar = tqdm(total=total, desc="measuring heads", unit="sample", disable=not progress)
    try:
        for number, source in enumerate(sources):
            count = number + 1
            name = fingerprint(source) if checkpoint is not None else ""
            inputs, shared = _resolved(model, source, metric_list)
            facts.add(inputs)
            if number < len(measured):
                if state.without_records:
                    _note(metric_list, inputs)
                if measured[number] != name:
                    raise CacheFileError(
                        f"{checkpoint} has sample {number} with other contents than this run: it is the checkpoint "
                        "of another data set or order."
                    )
                bar.update()
                continue
            if isinstance(source, SharedPrefix):
                facts.prefixes["whole" if shared is None else "reused"] += 1
            views = _one(model, inputs, metric_list, group_bytes, shared)
            _note(metric_list, inputs)
            _check(pending)  # one sample late, so that the device is never waited for in between
            pending = views
            state.finished(name)
            bar.update()
            if checkpoint is not None and count % save_every == 0:
                _check(pending)
                state.save()
        _check(pending)
    except KeyboardInterrupt:
        _check(pending)
        state.save()
        raise
    finally:
        bar.close()
    if count < len(measured):
        raise CacheFileError(
            f"{checkpoint} holds {len(measured)} samples; this run has {count}: it is the checkpoint of a larger data "
            "set. Use another file."
        )
    if not state.done:
        if not _pooled(metric_list):
            raise no_sample("measure")
        for metric in metric_list:
            metric.to(model.device)  # type: ignore[attr-defined]  # where the samples of other processes are
    state.save()
    results = [metric.compute() for metric in metric_list]
    for result in results:
        if isinstance(result, HeadScores):
            result.provenance = {**facts.provenance(), **result.provenance}
    return results


#: ids of the metrics that are being filled
_RESERVED: set[int] = set()
_RESERVING = threading.Lock()


@contextmanager
def _reserved(metrics: Sequence[Metric]) -> Iterator[None]:
    """Reject metrics that another `measure` fills, in another thread or around this one, in the body of a `with`."""
    ids = {id(metric) for metric in metrics}
    with _RESERVING:
        if ids & _RESERVED:
            raise InputError(
                "A metric object is in use by another `measure`, in another thread or around this one, and would mix "
                "the samples of both: create one for each."
            )
        _RESERVED.update(ids)
    try:
        yield
    finally:
        with _RESERVING:
            _RESERVED.difference_update(ids)


def _metric_list(metrics: Any) -> list[Metric]:
    several = not _is_metric(metrics) and isinstance(metrics, Sequence)
    metric_list: list[Any] = list(metrics) if several else [metrics]
    if not metric_list or not all(map(_is_metric, metric_list)):
        raise InputError(
            f"Expected a metric or several, such as metrics.RetrievalAttentionMass(); got {metrics!r}. A metric of "
            "your own subclasses metrics.HeadMetric."
        )
    if len({id(metric) for metric in metric_list}) < len(metric_list):
        raise InputError("One metric object is in the list twice, and would count every sample twice: create two.")
    return metric_list


def _note(metrics: Sequence[Metric], inputs: ResolvedInput) -> None:
    """Record the ids and templates of measured samples in the metrics that keep them."""
    for metric in metrics:
        note = getattr(metric, "note_samples", None)
        if note is not None:
            note(inputs.ids, {sample.template for sample in inputs.samples if sample.template})


def _pooled(metrics: Sequence[Metric]) -> bool:
    """Whether the metrics add the samples of several processes: then one may have none, and `compute` checks them."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return running and all(hasattr(metric, "sync_context") for metric in metrics)


def _resolved(model: Model, source: ModelInput, metrics: Sequence[Metric]) -> tuple[ResolvedInput, SharedPrefix | None]:
    """An input on the model's device; and the batch itself, if its shared prefix can be run once."""
    if isinstance(source, SharedPrefix) and not reasons_to_run_whole(model, source, metrics):
        check_maker(source, model.family)
        return source.resolved(model.device), source
    inputs = model.resolve(source)
    inputs.check_whole()
    return inputs, None


def _check(views: list[AttentionView]) -> None:
    for view in views:
        view.check()
    views.clear()


def _one(
    model: Model, inputs: ResolvedInput, metrics: Sequence[Metric], group_bytes: int, shared: SharedPrefix | None
) -> list[AttentionView]:
    """One forward pass of the language model, no logits, the metrics fed layer by layer; or a shared prefix, once."""
    collector = _Collector(metrics, model.cfg.n_layers, inputs, group_bytes)
    try:
        if shared is not None:
            run_shared(model, shared, collector)
            return collector.views
        names = "blocks.*.hook_resid_pre" if any(getattr(metric, "needs_residual", False) for metric in metrics) else []
        with tapping(model, collector), model.registry.attached(names, collector.keep_residual, reads_only=True):
            with torch.no_grad():
                model.run_trunk(inputs)
    except BaseException:
        for metric in metrics:
            metric.setup(model.info)  # drops the half-measured sample
        raise
    return collector.views
