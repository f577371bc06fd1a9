"""Sweep: many variants of a run in batches, each computed from the first block that it changes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError, NumericsError
from hooked_mllm.inputs.resolve import ModelInput
from hooked_mllm.interventions.base import Edit
from hooked_mllm.objectives.function import ObjectiveLike
from hooked_mllm.objectives.values import bound_objective
from hooked_mllm.sweep.batching import BatchSize, free_bytes
from hooked_mllm.sweep.trunk import Trunk
from hooked_mllm.sweep.variant import Prepared, Variant, edit_by_variant, prepare

if TYPE_CHECKING:
    #: the device that holds the residual streams
    Offload = Literal["auto", "device", "cpu"]
else:
    Offload = str
#: share of free memory beyond which the residual streams are kept on the CPU
KEEP_SHARE = 0.2
#: the sequence is divided into this many parts; variants whose first changed position is in the same part share batches
POSITION_GROUPS = 16
#: largest factor by which batches grow whose variants change only the end of a sequence
MAX_BATCH_FACTOR = 8


@checked
class Sweep:
    r"""One run, and an objective of many variants of it.

    A variant starts at the first block that it edits, from the recorded residual stream, and variants that start at the
    same block share a batch. If variants edit only late positions, only these are computed again. The values are those
    of one forward pass for each variant, within floating-point noise.

    Variants that edit something outside the decoder blocks (the vision tower, the embedding, the logits) are run as
    whole forward passes. Registered hooks and interventions apply to every run.

    Args:
        model: A `HookedMLLM`.
        inputs: A sample, a batch, or a mapping of model inputs.
        objective: Computed for each variant: an `Objective`, one that is bound to other inputs of the same layout, or a
            function of logits `[batch 1 d_vocab]` at the last position of the prompt.
        corrupted: The other run of a pair, for objectives that compare two.
        batch_size: Variants in a batch; None: set by free memory. It is reduced when memory runs out.
        offload: The device that keeps the residual streams: "auto", "device" or "cpu".
        compile: Compile blocks without hooks, which takes about half a minute.

    Attributes:
        clean: The objective without any variant, `[sample]`.
        batch: The number of variants in a batch, and how often it was reduced.

    Raises:
        HookValueError: Under an attention whose heads depend on the batch (a routing policy).
        NumericsError: If the clean run's objective is not finite.

    Examples:
        >>> from hooked_mllm import HeadAblation, HookedMLLM, objectives, toys
        >>> from hooked_mllm.sweep import Sweep
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1, answer=True)[0]
        >>> sweep = Sweep(model, sample, objectives.AnswerLogProb())
        >>> heads = [HeadAblation([(2, h)], mode="zero", phase="both") for h in range(8)]
        >>> sweep.run(heads).shape
        torch.Size([8, 1])
    """

    def __init__(
        self,
        model: Model,
        inputs: ModelInput,
        objective: ObjectiveLike,
        *,
        corrupted: ModelInput | None = None,
        batch_size: int | None = None,
        offload: Offload = "auto",
        compile: bool = False,
    ) -> None:
        if offload not in ("auto", "device", "cpu"):
            raise HookValueError(f"offload is 'auto', 'device' or 'cpu'; got {offload!r}.")
        if getattr(model.wiring.text[0].running, "adaptive", False):
            raise HookValueError(
                "A routing policy selects dense heads for all rows of a batch at once, so that variants in one batch "
                "would change each other. Run the prompt once and pass the heads that it selected to HybridAttention."
            )
        self.model = model
        self.inputs = model.resolve(inputs)
        self.inputs.check_whole()  # each run of a variant would extend the KV cache
        bound = bound_objective(model, self.inputs, objective, corrupted)
        self.trunk = Trunk.record(model, self.inputs, self._stream_device(offload))
        self.trunk.compiled = compile
        logits = self.trunk.logits(self.trunk.start(self.trunk.n_layers, 1), bound.positions)
        clean_is_missing = bound.objective.needs_clean and bound.clean is None
        self.bound = bound.with_clean(logits) if clean_is_missing else bound
        self.clean = self._finite(self.bound(logits).detach()[None], ())[0]
        last, tokens = self.trunk.n_layers - 1, self.inputs.batch * self.inputs.length
        self.batch = BatchSize(
            tokens, model.device, batch_size, lambda n: self.trunk.resume(last, self.trunk.start(last, n))
        )

    def run(
        self,
        variants: Sequence[Variant],
        *,
        skip: Callable[[int], bool] | None = None,
        done: Callable[[list[int], Tensor], None] | None = None,
    ) -> Float[Tensor, "variant sample"]:
        """The objective of each variant.

        Args:
            variants: An intervention each, or several.
            skip: Whether the variant of an index is left out; its values are NaN.
            done: Called after each batch with indices and values, float64 `[variant sample]`.

        Raises:
            HookNameError, HeadError, HookValueError: For a variant that does not fit the model, before anything runs.
            NumericsError: If an objective is not finite.
        """
        prepared = [p for p in prepare(self.model, variants, self.inputs) if skip is None or not skip(p.number)]
        out = torch.full((len(variants), self.inputs.batch), torch.nan, dtype=torch.float64)
        for part, values in self._values(prepared):
            numbers = [p.number for p in part]
            out[numbers] = values
            if done is not None:
                done(numbers, values)
        return out

    def _values(self, prepared: Sequence[Prepared]) -> Iterator[tuple[Sequence[Prepared], Tensor]]:
        """Values of all variants, in groups that start at the same block and about the same position."""
        groups: dict[tuple[int, int], list[Prepared]] = {}
        alone, length = self.trunk.alone, self.inputs.length
        group_length = -(-length // POSITION_GROUPS)
        if alone and any(variant.first for variant in prepared):
            _ = self.trunk.attention  # recorded now, while no variant is applied
        for variant in prepared:
            if variant.layer is None:
                yield [variant], self._whole(variant)[None]
            else:
                first = variant.first // group_length * group_length if alone else 0
                groups.setdefault((variant.layer, first), []).append(variant)
        for layer, first in sorted(groups):
            factor = min(length // (length - first), MAX_BATCH_FACTOR)
            group = sorted(groups[layer, first], key=lambda p: p.first)

            def run(part: Sequence[Prepared], layer: int = layer) -> Tensor:
                return self.tail(part, layer, part[0].first if alone else 0)

            yield from self.batch.run(group, run, factor)

    def tail(self, part: Sequence[Prepared], layer: int, first: int = 0) -> Float[Tensor, "variant sample"]:
        """The objective of a batch of variants that start at block `layer` and change nothing before `first`."""
        residual = self.forward(part, layer, first=first)
        logits = self.trunk.logits(residual, self.bound.positions, first)
        logits = logits.unflatten(0, (self.inputs.batch, len(part)))  # [row n d_vocab] -> [sample variant n d_vocab]
        values = torch.stack([self.bound(logits[:, i]).detach() for i in range(len(part))])
        return self._finite(values, part)

    def forward(
        self, part: Sequence[Prepared], layer: int, stop: int | None = None, first: int = 0
    ) -> Float[Tensor, "row pos d_model"]:
        """The residual stream of a batch of variants from block `layer` up to block `stop`, from position `first` on.

        Rows are `sample * len(part) + variant`.
        """
        stop = self.trunk.n_layers if stop is None else stop
        last = min(1 + max(p.last for p in part), stop)
        residual = self.trunk.start(layer, len(part), first)
        with self.applied(part):
            residual = self.trunk.resume(layer, residual, last, first)
        return self.trunk.resume(last, residual, stop, first)  # without hooks of the sweep

    @contextmanager
    def applied(self, part: Sequence[Prepared]) -> Iterator[None]:
        """Apply the edits of each variant to its own rows of a resumed run, for the body of a `with` statement."""
        edits: dict[str, list[tuple[int, Edit]]] = {}
        for index, variant in enumerate(part):
            for name, edit in variant.edits:
                edits.setdefault(name, []).append((index, edit))
        batch, attached = self.inputs.batch, self.model.registry.attached
        with ExitStack() as stack:
            for name, edits_here in edits.items():
                stack.enter_context(attached(name, edit_by_variant(edits_here, batch, len(part))))
            yield

    def _whole(self, variant: Prepared) -> Float[Tensor, " sample"]:
        with self.model.intervene(*variant.interventions), torch.no_grad():
            residual = self.model.run(self.inputs, stop_at_layer=self.trunk.n_layers)
            logits = self.trunk.logits(residual, self.bound.positions)
        return self._finite(self.bound(logits).detach()[None], [variant])[0]

    def _finite(self, values: Float[Tensor, "variant sample"], part: Sequence[Prepared]) -> Tensor:
        values = values.double().cpu()
        bad = (~torch.isfinite(values)).any(1).nonzero()
        if len(bad):
            run = repr(part[int(bad[0])].interventions) if part else "the run without any variant"
            raise NumericsError(
                f"The objective is not finite ({values[bad[0]].flatten().tolist()}) in {run}: the model overflowed, "
                "or the objective is not defined there. Load the model with dtype='bfloat16' or 'float32'."
            )
        return values

    def _stream_device(self, offload: Offload) -> torch.device | None:
        """The device that keeps the residual streams; None for that of the model."""
        if offload == "device":
            return None
        free = free_bytes(self.model.device)
        if offload == "cpu" or free is None:
            return torch.device("cpu")
        cfg = self.model.cfg
        width = torch.finfo(self.model.dtype).bits // 8
        needed = (cfg.n_layers + 1) * self.inputs.batch * self.inputs.length * cfg.d_model * width
        return torch.device("cpu") if needed > KEEP_SHARE * free else None
