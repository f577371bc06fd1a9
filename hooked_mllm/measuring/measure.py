"""`model.measure`: one forward pass a sample, no logits; attention rows shared by the metrics, layers in groups."""

import hashlib
from collections.abc import Iterable, Sequence
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
from hooked_mllm.measuring.checkpoint import MeasureCheckpoint, identity_of
from hooked_mllm.measuring.query_selection import QuerySelection, Selections
from hooked_mllm.measuring.shared_prefix import SharedPrefix, reasons_to_run_whole, run_shared
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
    """The query tokens whose rows the metrics read, if all of them say so in an attribute `queries`."""
    names: dict[str, None] = {}
    for metric in metrics:
        queries = getattr(metric, "queries", None)
        named = (queries,) if isinstance(queries, str) else queries
        if not isinstance(named, tuple | list) or not all(isinstance(name, str) for name in named):
            return None
        names.update(dict.fromkeys(named))
    return tuple(names) or None


class _Collector:
    """Holds back q and k of consecutive layers and hands them to the metrics as one view.

    Of q only the rows that the metrics read, where they name them.
    """

    def __init__(self, metrics: Sequence[Metric], n_layers: int, inputs: ResolvedInput, group_bytes: int) -> None:
        self.metrics, self.n_layers, self.inputs, self.group_bytes = metrics, n_layers, inputs, group_bytes
        self.names = named_queries(metrics)
        self.held: list[_Held] = []
        self.views: list[AttentionView] = []
        self._bytes = self._each = 0
        #: the residual stream entering a layer, where a metric asks for it
        self.residual: dict[int, Tensor] = {}
        self._selections: dict[torch.device, Selections] = {}  # resolved once a sample, for they may wait for a device
        self._chosen: list[tuple[str, QuerySelection]] | None = None

    def __call__(self, call: AttentionCall) -> None:
        if self.held and self.held[0].k.device != call.k.device:
            self.flush()
            self._chosen = None
        q, k = call.q, call.k
        if q.requires_grad or k.requires_grad:  # hooks may turn gradients on
            q, k = q.detach(), k.detach()
        first = k.shape[2] - q.shape[2]
        if self._chosen is None:
            selections = self._selected(k)
            self._chosen = [(name, selections.queries(name)) for name in self.names or ()]
        rows = {name: some.take(q, slice(0, some.length), first).contiguous() for name, some in self._chosen}
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
        view = AttentionView(
            [h.layer for h in held],
            whole or {name: [h.rows[name] for h in held] for name in held[0].rows},
            [h.k for h in held],
            [h.mask for h in held],
            [h.scale for h in held],
            self._selected(held[0].k),
            self.n_layers,
            context=self._context(held),
            first=held[0].first,
        )
        for metric in self.metrics:
            metric.update(view=view)
        view.release()
        self.views.append(view)

    def _context(self, held: Sequence[_Held]) -> ViewContext:
        tokens = self.inputs.tensors.get("input_ids")
        residual = [self.residual.pop(h.layer) for h in held] if self.residual else None
        return ViewContext(None if tokens is None else tokens.to(held[0].k.device), self.inputs.layouts, residual)

    def keep_residual(self, value: Tensor, hook: HookPoint) -> None:
        """A hook on the residual stream."""
        self.residual[hook.layer()] = value.detach()


def _is_metric(value: Any) -> bool:
    return isinstance(value, Metric) and not isinstance(value, type)  # a class has a metric's methods, too


#: numbers of a pixel tensor that its fingerprint reads
PIXELS = 1 << 16


def fingerprint(inputs: ModelInput) -> str:
    """A short name of an input's contents: its tokens and target, and its pixels at evenly spaced positions."""
    digest = hashlib.sha256()
    tensors = tensors_of(inputs)
    for name in sorted(tensors):
        value = tensors[name]
        if isinstance(value, Tensor):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            if value.is_floating_point():
                flat = value.reshape(-1)
                value = flat[:: max(1, len(flat) // PIXELS)].float()
            digest.update(value.cpu().numpy().tobytes())
    for sample in samples_of(inputs):
        if sample.target_mask is not None:
            digest.update(sample.target_mask.numpy().tobytes())
    return digest.hexdigest()[:16]


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
    several = not _is_metric(metrics) and isinstance(metrics, Sequence)
    chosen: list[Metric] = list(metrics) if several else [metrics]  # type: ignore[arg-type,list-item]
    if not chosen or not all(map(_is_metric, chosen)):
        raise InputError(
            f"Expected a metric or several, such as metrics.RetrievalAttentionMass(); got {metrics!r}. A metric of "
            "your own subclasses metrics.HeadMetric."
        )
    sources, total = each_sample(samples), sample_count(samples)
    for metric in chosen:
        metric.setup(model.info)
    state = MeasureCheckpoint(checkpoint, chosen, {} if checkpoint is None else identity_of(model))
    state.load()
    skip, ids, templates, seen = list(state.done), [], set(), 0
    prefix = {"reused": 0, "whole": 0}
    pending: list[AttentionView] = []
    bar = tqdm(total=total, desc="measuring heads", unit="sample", disable=not progress)
    try:
        for number, source in enumerate(sources):
            seen = number + 1
            name = fingerprint(source) if checkpoint is not None else ""
            shared = source if isinstance(source, SharedPrefix) else None
            if shared is not None and reasons_to_run_whole(model, shared, chosen):
                shared = None
            if shared is not None:
                check_maker(shared, model.family)
            inputs = model.resolve(source) if shared is None else shared.resolved(model.device)
            ids += [i for i in inputs.ids if i is not None]
            templates |= {sample.template for sample in inputs.samples if sample.template}
            if number < len(skip):
                if skip[number] != name:
                    raise CacheFileError(
                        f"{checkpoint} has sample {number} with other contents than this run: it is the checkpoint "
                        "of another data set or order."
                    )
                bar.update()
                continue
            if isinstance(source, SharedPrefix):
                prefix["whole" if shared is None else "reused"] += 1
            views = _one(model, inputs, chosen, group_bytes, shared)
            _check(pending)  # one sample late, so that the device is never waited for in between
            pending = views
            state.finished(name)
            bar.update()
            if checkpoint is not None and (number + 1) % save_every == 0:
                _check(pending)
                state.save()
        _check(pending)
    except KeyboardInterrupt:
        _check(pending)
        state.save()
        raise
    finally:
        bar.close()
    if seen < len(skip):
        raise CacheFileError(
            f"{checkpoint} holds {len(skip)} samples; this run has {seen}: it is the checkpoint of a larger data "
            "set. Use another file."
        )
    if not state.done:
        raise no_sample("measure")
    state.save()
    results = [metric.compute() for metric in chosen]
    for result in results:
        if isinstance(result, HeadScores):
            runs = prefix if any(prefix.values()) else None
            facts = {"sample_ids": ids, "templates": sorted(templates), "shared_prefix": runs}
            result.provenance.update({k: v for k, v in facts.items() if v})
    return results if several else results[0]


def _check(views: list[AttentionView]) -> None:
    for view in views:
        view.check()
    views.clear()


def _one(
    model: Model,
    inputs: ResolvedInput,
    metrics: Sequence[Metric],
    group_bytes: int,
    shared: SharedPrefix | None,
) -> list[AttentionView]:
    """One forward pass of the language model, no logits, the metrics fed layer by layer; or a shared prefix, once."""
    collector = _Collector(metrics, model.cfg.n_layers, inputs, group_bytes)
    sites = model.wiring.text
    taken = []
    hung = []
    try:
        if shared is not None:
            run_shared(model, shared, collector)
            return collector.views
        if any(getattr(metric, "needs_residual", False) for metric in metrics):
            hung = model.registry.attach("blocks.*.hook_resid_pre", collector.keep_residual, reads_only=True)
        for site in sites:
            site.add_tap(collector)
            taken.append(site)
        with torch.no_grad():
            model.run_trunk(inputs)
    except BaseException:
        for metric in metrics:
            metric.setup(model.info)  # drops the half-measured sample
        raise
    finally:
        for site in taken:
            site.remove_tap(collector)
        model.registry.detach(hung)
    return collector.views
