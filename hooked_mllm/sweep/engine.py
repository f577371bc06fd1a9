"""Sweep: the same run in many variants, each taken up at the block where it first differs, many in one batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError, NumericsError
from hooked_mllm.hooks import Handle, HookPoint
from hooked_mllm.inputs.resolve import ModelInput
from hooked_mllm.interventions import Intervention
from hooked_mllm.objectives import BoundObjective, as_objective
from hooked_mllm.sweep.batching import BatchSize, free_bytes
from hooked_mllm.sweep.trunk import Trunk
from hooked_mllm.sweep.variant import Prepared, Variant, on_rows, prepare

#: share of free memory beyond which the residual streams are kept on the CPU
KEEP_SHARE = 0.2
#: the sequence is divided into so many places, and variants that first change the same one share batches
PLACES = 16
#: times as many variants that change only the end of a sequence go in a batch
MOST_MORE = 8


class Sweep:
    r"""One run, and an objective of as many variants of it as are asked for.

    What a variant does in block l changes nothing before block l. The run is made once and the residual stream entering
    each block is kept; a variant starts at the first block that it edits, and variants that start at the same block
    share a batch. Of a variant that edits only late positions, only these are run again: earlier ones see nothing of
    it, and their keys and values are those of the clean run. The numbers are those of a loop of forward passes, one a
    variant, within floating-point noise (in bfloat16 the order of summation depends on the batch).

    Variants that edit something outside the decoder blocks (the vision tower, the embedding, the logits) are run as
    whole forward passes. Hooks and interventions that hang already are part of every run.

    Args:
        model: A `HookedMLLM`.
        inputs: A sample, a batch, or a mapping of model inputs.
        objective: What is computed of each variant: an `Objective`, one that is bound to other inputs of the same
            layout, or a function of logits `[batch n d_vocab]` at the last prompt position.
        corrupted: The other run of a pair, for objectives that compare two.
        batch_size: Variants in a batch; None chooses by free memory. It shrinks when memory runs out.
        offload: Where the residual streams are kept: "auto", "device" or "cpu".
        compile: Run blocks without hooks through `torch.compile`: worth its half minute for many heads of a large
            model on a GPU.

    Attributes:
        clean: The objective without any variant, `[sample]`.
        batch: How many variants go in a batch, and how often that had to shrink.

    Raises:
        HookValueError: under an attention whose heads depend on the batch (a routing policy).
        NumericsError: when the clean run's objective is not finite.

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
        objective: Any,
        *,
        corrupted: ModelInput | None = None,
        batch_size: int | None = None,
        offload: str = "auto",
        compile: bool = False,
    ) -> None:
        if offload not in ("auto", "device", "cpu"):
            raise HookValueError(f"offload is 'auto', 'device' or 'cpu'; got {offload!r}.")
        if getattr(model.wiring.text[0].running, "adaptive", False):
            raise HookValueError(
                "A routing policy chooses dense heads for all rows of a batch at once, so that variants that share one "
                "would change each other. Run the prompt once and give HybridAttention what the policy chose."
            )
        self.model = model
        self.inputs = model.resolve(inputs)
        bound = objective
        if not isinstance(bound, BoundObjective):
            other = None if corrupted is None else model.resolve(corrupted)
            bound = as_objective(objective).bind(model, self.inputs, other)
        self.trunk = Trunk.record(model, self.inputs, self._keep_on(offload))
        self.trunk.compiled = compile
        logits = self.trunk.logits(self.trunk.start(self.trunk.n_layers, 1), bound.positions)
        needed = bound.objective.needs_clean and bound.clean is None
        self.bound = bound.with_clean(logits) if needed else bound
        self.clean = self._finite(self.bound(logits).detach()[None], ())[0]
        tokens = self.inputs.batch * self.inputs.length
        self.batch = BatchSize(tokens, model.device, batch_size, self._one_block)

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
            skip: Whether a variant, by its number, is left out; its row is NaN.
            done: Told numbers and values, float64 `[variant sample]`, of each batch as it is finished.

        Raises:
            HookNameError, HeadError, HookValueError: for a variant that does not fit the model, before anything runs.
            NumericsError: when an objective is not finite.
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
        groups: dict[tuple[int, int], list[Prepared]] = {}
        alone, length = self.trunk.alone, self.inputs.length
        step = -(-length // PLACES)
        if alone and any(each.first for each in prepared):
            _ = self.trunk.attention  # recorded now, while no variant is applied
        for each in prepared:
            if each.layer is None:
                yield [each], self._whole(each)[None]
            else:
                first = each.first // step * step if alone else 0
                groups.setdefault((each.layer, first), []).append(each)
        for layer, first in sorted(groups):
            more = min(length // (length - first), MOST_MORE)
            group = sorted(groups[layer, first], key=lambda p: p.first)

            def one(part: Sequence[Prepared], layer: int = layer) -> Tensor:
                return self.tail(part, layer, min(p.first for p in part) if alone else 0)

            yield from self.batch.run(group, one, more)

    def tail(self, part: Sequence[Prepared], layer: int, first: int = 0) -> Float[Tensor, "variant sample"]:
        """The objective of a batch of variants that start at block `layer` and change nothing before `first`."""
        residual = self.forward(part, layer, first=first)
        logits = self.trunk.logits(residual, self.bound.positions, first)
        logits = logits.unflatten(0, (self.inputs.batch, len(part)))
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
        return self.trunk.resume(last, residual, stop, first)  # nothing of the sweep's own hangs there

    @contextmanager
    def applied(self, part: Sequence[Prepared]) -> Iterator[None]:
        """Within it, each row of a resumed run has its own variant's edits."""
        entries: dict[str, list[tuple[int, Any]]] = {}
        for place, variant in enumerate(part):
            for name, edit in variant.edits:
                entries.setdefault(name, []).append((place, edit))
        added: list[tuple[HookPoint, Handle]] = []
        try:
            for name, edits in entries.items():
                point = self.model.registry[name]
                added.append((point, point.add_hook(on_rows(edits, self.inputs.batch, len(part)))))
            yield
        finally:
            self.model.registry.detach(added)

    def _whole(self, variant: Prepared) -> Float[Tensor, " sample"]:
        chosen: tuple[Intervention, ...] = variant.interventions
        with self.model.intervene(*chosen), torch.no_grad():
            residual = self.model.run(self.inputs, stop_at_layer=self.trunk.n_layers)
            logits = self.trunk.logits(residual, self.bound.positions)
        return self._finite(self.bound(logits).detach()[None], [variant])[0]

    def _finite(self, values: Float[Tensor, "variant sample"], part: Sequence[Prepared]) -> Tensor:
        values = values.double().cpu()
        bad = (~torch.isfinite(values)).any(1).nonzero()
        if len(bad):
            what = repr(part[int(bad[0])].interventions) if part else "the run without any variant"
            raise NumericsError(
                f"The objective is not finite ({values[bad[0]].flatten().tolist()}) in {what}: the model overflowed, "
                "or the objective is not defined there. Load the model with dtype='bfloat16' or 'float32'."
            )
        return values

    def _keep_on(self, offload: str) -> torch.device | None:
        if offload == "device":
            return None
        free = free_bytes(self.model.device)
        if offload == "cpu" or free is None:
            return torch.device("cpu")
        cfg = self.model.cfg
        width = torch.finfo(self.model.dtype).bits // 8
        needed = (cfg.n_layers + 1) * self.inputs.batch * self.inputs.length * cfg.d_model * width
        return torch.device("cpu") if needed > KEEP_SHARE * free else None

    def _one_block(self, repeats: int) -> None:
        layer = self.trunk.n_layers - 1
        self.trunk.resume(layer, self.trunk.start(layer, repeats))
