"""The base classes of metrics of attention heads: exact states, samples that are added whole or not at all."""

import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from hooked_mllm.checks import checked
from hooked_mllm.contracts import ModelInfo
from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.heads import HeadScores, SampleScores
from hooked_mllm.heads.counting import Share
from hooked_mllm.measuring.attention_view import AttentionView

Kept = TypeVar("Kept", bound="HeadMetric")
#: the state with the ids and templates of samples, lines of JSON as bytes
RECORDS = "records"


@dataclass(frozen=True)
class Piece:
    """The part of a sample from one view: its layers, and tensors by name."""

    layers: tuple[int, ...]
    parts: dict[str, Tensor]


class Configured:
    """Settings and representation by the constructor's arguments."""

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that are attributes of the same name."""
        parameters = inspect.signature(type(self).__init__).parameters
        return {name: getattr(self, name) for name in parameters if name != "self" and hasattr(self, name)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.config().items())})"


@checked
class AttentionMetric(Configured, Metric):
    """A `torchmetrics.Metric` that is fed attention views; base of `HeadMetric` and of metrics of head groups.

    A sample has one or more views, each a group of layers, and is added after the last one: an interrupted run leaves
    no half of a sample in the sums. Sums are float64 and counts int64, also under `.half()` and `.to(dtype)`; they are
    in `state_dict()`, and `compute()` sums them over processes under `torch.distributed`, of which some may have no
    sample.
    """

    records: Tensor

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self._info: ModelInfo | None = None
        self._pieces: list[Piece] = []
        self.add_state(RECORDS, torch.zeros(0, dtype=torch.uint8), dist_reduce_fx="cat", persistent=True)

    def setup(self, info: ModelInfo) -> None:
        """Allocate states and drop an unfinished sample; raises a HeadError if it has results of another shape."""
        self._check_constructed()
        self._allocate(info.n_layers, info.n_heads)
        self._info = info
        self._pieces = []

    def update(self, *, view: AttentionView) -> None:
        """Add one group of layers of a sample or batch; raises an InputError if a layer comes twice in it."""
        self._check_constructed()
        self._allocate(view.n_layers, view.n_heads)
        if not self._pieces and self.device != view.device:
            self.to(view.device)
        twice = {layer for piece in self._pieces for layer in piece.layers}.intersection(view.layers)
        if twice:
            raise InputError(
                f"{self!r}: layer {min(twice)} came twice within one sample. Views come in order of layers and the "
                "last holds the model's last layer; call setup() or reset() after an interrupted sample."
            )
        self._pieces.append(Piece(view.layers, {n: part.to(self.device) for n, part in self.observe(view).items()}))
        if view.is_last:
            pieces, self._pieces = self._pieces, []
            self.commit(pieces)

    @abstractmethod
    def observe(self, view: AttentionView) -> dict[str, Tensor]:
        """Tensors of this view, by name."""

    @abstractmethod
    def commit(self, pieces: Sequence[Piece]) -> None:
        """Add a finished sample (or batch) to the states."""

    @abstractmethod
    def _allocate(self, n_layers: int, n_heads: int) -> None:
        """Allocate the states."""

    def note_samples(self, ids: Iterable[str | None], templates: Iterable[str] = ()) -> None:
        """Add the ids and chat templates of samples to the provenance of results; `measure` calls it."""
        record = [[name for name in ids if name is not None], sorted(templates)]
        if any(record):
            line = torch.frombuffer(bytearray(json.dumps(record).encode() + b"\n"), dtype=torch.uint8)
            self.records = torch.cat([self.records, line.to(self.records.device)])

    def provenance(self) -> dict[str, Any]:
        """Facts about the metric, the model and all samples, for results."""
        model = {} if self._info is None else self._info.provenance()
        records = [json.loads(line) for line in self.records.cpu().numpy().tobytes().splitlines()]
        samples = {
            "sample_ids": [name for ids, _ in records for name in ids],
            "templates": sorted({template for _, templates in records for template in templates}),
        }
        facts = {name: values for name, values in samples.items() if values}
        return {"metric": type(self).__name__, "config": self.config(), **model, **facts}

    def reset(self) -> None:
        """Remove all samples."""
        super().reset()
        self._pieces = []

    def merge_state(self, incoming_state: "dict[str, Any] | Metric") -> None:
        """Add the samples of another metric, or of its `metric_state`; raises a ValueError for other settings."""
        if isinstance(incoming_state, AttentionMetric):
            if type(incoming_state) is not type(self) or incoming_state.config() != self.config():
                raise ValueError(
                    f"Only metrics of one class with the same settings can be merged: {self!r} and {incoming_state!r}."
                )
            incoming_state = incoming_state.metric_state
        if isinstance(incoming_state, dict):
            incoming_state = {name: value.to(self.device) for name, value in incoming_state.items()}
            incoming_state.setdefault(RECORDS, self.records[:0])  # states of earlier versions have none
            self._match(incoming_state)
        super().merge_state(incoming_state)
        self._computed = None

    @property
    def update_called(self) -> bool:
        """True: `compute` without samples raises an InputError."""
        return True

    @contextmanager
    def sync_context(self, *args: Any, **options: Any) -> Generator[None, None, None]:
        """As torchmetrics', and the metric has its own samples again after an error, too."""
        synced = self._is_synced
        try:
            with super().sync_context(*args, **options):
                yield
        finally:
            self.unsync(self._is_synced and not synced and options.get("should_unsync", True))

    def synced(self) -> AbstractContextManager[Any]:
        """Context manager: states summed over all processes, for results other than `compute()`."""
        return self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync and not self._is_synced)

    def _check_constructed(self) -> None:
        if "_defaults" not in self.__dict__:
            raise InputError(
                f"{type(self).__name__}.__init__ must call super().__init__() first, before it keeps settings of its "
                "own: without it the metric has no sums to add to."
            )

    def _resize(self, name: str, shape: tuple[int, ...]) -> None:
        """Allocate an empty state; raise if one that is in use has another shape."""
        state: Tensor = getattr(self, name)
        if tuple(state.shape) == shape or (state.dim() == 3 and tuple(state.shape[1:]) == shape[1:]):
            return
        if state.numel():
            raise HeadError(
                f"{self!r} holds results of shape {list(state.shape)}; the model at hand needs {list(shape)}. Use a "
                "metric object of its own for every model."
            )
        self._defaults[name] = state.new_zeros(shape)
        setattr(self, name, state.new_zeros(shape))

    def _match(self, states: dict[str, Any]) -> None:
        """Allocate empty states in the shape of incoming ones."""
        for name in self._defaults:
            if name != RECORDS and name in states and states[name].numel():
                shape = tuple(states[name].shape)
                self._resize(name, shape if len(shape) < 3 else (0, *shape[1:]))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self._defaults:
            value = state_dict.pop(prefix + name, None)
            state: Tensor = getattr(self, name)
            if value is None and name == RECORDS:  # a state of an earlier version
                self.records = state[:0]
            elif value is None:
                missing_keys.append(prefix + name)
            elif value.dtype != state.dtype:
                error_msgs.append(f"{prefix + name} must be {state.dtype}; got {value.dtype}.")
            else:
                self._match({name: value})
                setattr(self, name, value.to(self.device, copy=True))
        self._computed = None
        self._pieces = []

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: object = None) -> None:
        # torchmetrics stacks what it gathers; states of unequal length are concatenated here
        group, kept = process_group or self.process_group, {name: getattr(self, name) for name in self._concatenated}
        for name, state in kept.items():
            setattr(self, name, state[:0])
        super()._sync_dist(lambda state, group: _of_one_shape(dist_sync_fn(state, group=group)), group)
        for name, state in kept.items():
            gathered = [part for part in dist_sync_fn(state, group=group) if part.numel()]
            setattr(self, name, torch.cat(gathered) if gathered else state)

    @property
    def _concatenated(self) -> list[str]:
        return [RECORDS]

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> "AttentionMetric":
        # devices change, dtypes do not: a float16 sum would lose the samples it adds
        def move(state: Tensor) -> Tensor:
            return state.to(fn(state.new_empty(0)).device)

        return super()._apply(move, exclude_state)  # type: ignore[return-value]


@checked
class HeadMetric(AttentionMetric):
    """A metric with one number per head and sample, averaged over samples.

    A subclass defines `score`. `AttentionView` has `profile`, `mass`, `rows`, `top` and the masks.

    Examples:
        >>> from hooked_mllm.metrics import HeadMetric
        >>> class SinkMass(HeadMetric):
        ...     '''Attention that the question pays to the very first token.'''
        ...
        ...     def score(self, view):
        ...         return view.profile("question")[..., 0]
        >>> SinkMass()
        SinkMass()
    """

    total: Tensor
    count: Tensor
    each: Tensor
    chance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("total")
        self.add_state("count", torch.zeros(0, dtype=torch.int64), dist_reduce_fx="sum", persistent=True)

    @abstractmethod
    def score(self, view: AttentionView) -> Float[Tensor, "layer batch head"]:
        """One number per layer of the view, sample of the batch and query head."""

    def compute(self) -> HeadScores:
        """The mean over samples, [layer head]; with state `chance`, even attention's score is in the provenance.

        Raises:
            NumericsError: For a score that is NaN or infinite, with its heads.
        """
        return self.scores("total", **(_even_attention(self) if "chance" in self._defaults else {}))

    def scores(self, state: str, name: str | None = None, **facts: Any) -> HeadScores:
        """A state divided by the number of samples."""
        if not bool(self.count.any()):
            raise InputError(f"{self!r} has seen no sample: there is nothing to compute.")
        values = getattr(self, state).to(device="cpu", dtype=torch.float64) / self.count.cpu()[:, None]
        return self._head_scores(values, name or type(self).__name__, facts)

    def _head_scores(self, values: Float[Tensor, "layer head"], name: str, facts: dict[str, Any]) -> HeadScores:
        """Values with the provenance; layers without samples are missing."""
        count = self.count.cpu()
        provenance = {**self.provenance(), **facts, "n_samples": int(count.max())}
        missing = (count == 0).nonzero().flatten().tolist()
        return HeadScores(values, name=name, provenance=provenance, counts=count, missing=missing)

    def keep_samples(self: Kept) -> Kept:
        """Keep the score of every sample, for `sample_scores`; called before the first sample; returns the metric."""
        self._check_constructed()
        if bool(self.count.any()):
            raise InputError(f"{self!r} has samples already: call keep_samples() before the first.")
        if "each" not in self._defaults:
            self.add_rows("each")
        return self

    def sample_scores(self) -> SampleScores:
        """The scores [sample layer head] over all processes; raises an InputError without `keep_samples` or sample."""
        if "each" not in self._defaults:
            raise InputError(f"{self!r} did not keep its samples: measure with {type(self).__name__}().keep_samples().")
        with self.synced():
            if not len(self.each):
                raise InputError(f"{self!r} has seen no sample: there is nothing to compute.")
            return SampleScores(self.each, name=type(self).__name__, provenance=self.provenance())

    def observe(self, view: AttentionView) -> dict[str, Tensor]:
        """The scores of this view; a subclass adds parts for other states."""
        return {"total": _checked(self, self.score(view), view)}

    def commit(self, pieces: Sequence[Piece]) -> None:
        """Add each part, summed over the batch, to the state of its name at its layers; append rows."""
        index = torch.tensor([layer for piece in pieces for layer in piece.layers], device=self.device)
        parts = {name: torch.cat([piece.parts[name] for piece in pieces]) for name in pieces[0].parts}
        batch = parts["total"].shape[1]
        for name in self._rows:
            part = parts["total"] if name == "each" else parts.pop(name)
            state: Tensor = getattr(self, name)
            rows = state.new_full((batch, *state.shape[1:]), torch.nan)  # layers that are not measured remain NaN
            rows[:, index] = part.transpose(0, 1).to(rows.dtype)  # [layer batch head] -> [sample layer head]
            setattr(self, name, torch.cat([state, rows]))
        for name, part in parts.items():
            state = getattr(self, name)
            setattr(self, name, state.index_add(0, index, part.sum(1, dtype=state.dtype)))
        self.count = self.count.index_add(0, index, torch.full_like(index, batch))

    def add_sum(self, name: str, *, per_head: bool = True, dtype: torch.dtype = torch.float64) -> None:
        """Add a state that is summed over samples, [layer head] or [layer]; `observe` returns its parts."""
        empty = torch.zeros((0, 0) if per_head else (0,), dtype=dtype)
        self.add_state(name, empty, dist_reduce_fx="sum", persistent=True)

    def add_rows(self, name: str) -> None:
        """Add a state that keeps every sample, [sample layer head]; `observe` returns its parts."""
        self.add_state(name, torch.zeros((0, 0, 0), dtype=torch.float64), dist_reduce_fx="cat", persistent=True)

    @property
    def _rows(self) -> list[str]:
        return [name for name, default in self._defaults.items() if isinstance(default, Tensor) and default.dim() == 3]

    @property
    def _concatenated(self) -> list[str]:
        return [RECORDS, *self._rows]

    def _allocate(self, n_layers: int, n_heads: int) -> None:
        for name, default in self._defaults.items():
            if isinstance(default, Tensor) and name != RECORDS:
                self._resize(name, {1: (n_layers,), 2: (n_layers, n_heads), 3: (0, n_layers, n_heads)}[default.dim()])


def check_share(share: Share, of: str = "") -> float:
    """The share as a plain number; raises for one that is not above 0 and at most 1."""
    if isinstance(share, bool) or not isinstance(share, Real) or not 0.0 < share <= 1.0:
        raise InputError(f"share must be above 0 and at most 1{of}; got {share!r}.")
    return share if isinstance(share, int) else float(share)


def _of_one_shape(gathered: Sequence[Tensor]) -> list[Tensor]:
    """The states of all processes; those without a sample, which may have no shape yet, are zeros."""
    shapes = {tuple(part.shape) for part in gathered if part.numel()}
    if len(shapes) > 1:
        raise HeadError(f"The processes measured models of different shapes: {sorted(shapes)}.")
    shape = shapes.pop() if shapes else gathered[0].shape
    return [part if part.shape == shape else part.new_zeros(shape) for part in gathered]


def _even_attention(metric: HeadMetric) -> dict[str, Any]:
    """Score of even attention by layer, None without samples; `chance_by_head`, too, where some heads stream."""
    if not metric.chance.numel():  # no sample yet
        return {}
    counts = metric.count.tolist()
    level = metric.chance.cpu() / metric.count.cpu().clamp(min=1)[:, None]  # [layer head]
    alike = bool((level == level[:, :1]).all())
    levels = {"chance": level[:, 0] if alike else level.mean(1)} | ({} if alike else {"chance_by_head": level})
    return {
        name: [c if n else None for c, n in zip(by_layer.tolist(), counts, strict=True)]
        for name, by_layer in levels.items()
    }


def _checked(metric: HeadMetric, score: object, view: AttentionView) -> Tensor:
    expected = {"layer": len(view.layers), "batch": view.batch, "head": view.n_heads}
    if not isinstance(score, Tensor):
        raise InputError(f"{metric!r}: score() must return a tensor [layer batch head]; got {type(score).__name__}.")
    shape = list(expected.values())
    if list(score.shape) != shape:
        wrong = f"{score.dim()} axes instead of 3"
        if score.dim() == 3:
            pairs = zip(expected, shape, score.shape, strict=True)
            wrong = ", ".join(f"axis '{axis}' has {got} instead of {size}" for axis, size, got in pairs if got != size)
        raise InputError(
            f"{metric!r}: score() must return a tensor [layer batch head] of shape {shape}; "
            f"got {list(score.shape)}: {wrong}."
        )
    if not score.is_floating_point():
        raise InputError(f"{metric!r}: score() must return floating-point numbers; got {score.dtype}.")
    return score.detach()
