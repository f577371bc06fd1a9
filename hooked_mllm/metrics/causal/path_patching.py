"""PathPatching: what one head passes on to others, or straight to the output, and to nothing else."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hooked_mllm.cache.keys import full_name
from hooked_mllm.contracts import Model
from hooked_mllm.corruptions.pair import as_pairs
from hooked_mllm.errors import HeadError
from hooked_mllm.heads import HeadScores, HeadSet, HeadsLike, head_names
from hooked_mllm.heads.parsing import Pairs
from hooked_mllm.hooks import Handle, HookPoint
from hooked_mllm.interventions import ActivationPatch, HeadPatch
from hooked_mllm.interventions.base import check_choice, heads_of, keep_heads
from hooked_mllm.metrics.causal.patching_effect import normalised, source_activations
from hooked_mllm.metrics.causal.swept import Job, SweptMetric
from hooked_mllm.storage import ready
from hooked_mllm.sweep import Sweep
from hooked_mllm.sweep.variant import Prepared, prepare

#: activations of a run by site and layer
Held = dict[str, dict[int, Tensor]]
#: what of a receiver may be patched
INPUTS = ("q", "k", "v")


class PathPatching(SweptMetric):
    r"""What each head passes on directly to the receivers: patched along these paths alone.

    For each sender head, three runs (Wang et al. 2022): (1) the base and the source; (2) the base, in which the
    sender's z is the source's and every later head is held at the base's z, so that the change travels along the
    residual stream (and through MLPs, unless they are held, too) but through no other head; the receivers' inputs are
    kept; (3) the base, in which the receivers take these inputs and everything behind them runs freely.

    $$\mathrm{effect}_{s \to R} = \frac{\sum_x m(\text{base} \mid R \leftarrow R(s)) - m(\text{base})}
    {\sum_x m(\text{source}) - m(\text{base})}$$

    With `receivers="logits"`, run 2 goes on to the logits and is the answer: the sender's direct effect.

    Args:
        receivers: Heads that receive: a `HeadSet`, "L2H4, L3H1", pairs, a boolean mask `[layer head]`, or a list of
            these; or "logits".
        inputs: Which of their inputs are patched: "q", "k", "v". Key and value belong to the whole key-value head.
        direction: "noising" (base: clean; an effect of 1 loses the clean result) or "denoising" (base: corrupted).
        freeze_mlps: Hold MLPs in run 2 at the base's outputs as well.
        normalise: Divide by the whole difference of the two runs.

    Raises:
        HeadError: for no receivers, or receivers in the first layer, which receive nothing from heads.

    Source: Wang et al. 2022, arXiv:2211.00593 (section 3.1); Goldowsky-Dill et al. 2023, arXiv:2304.05969.

    Examples:
        >>> from hooked_mllm import HookedMLLM, corruptions, metrics, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-internvl")
        >>> clean = toys.VisualRetrieval(pages=1).samples(model, 1, answer=True)[0]
        >>> pair = (clean, corruptions.MeanRegion()(model, clean))
        >>> paths = metrics.PathPatching("logits")
        >>> scores = paths.run(model, pair, objective=objectives.AnswerLogProb(), progress=False)
        >>> scores.shape
        (6, 8)
    """

    doing = "patching paths"
    paired = True

    def __init__(
        self,
        receivers: HeadsLike,
        *,
        inputs: Sequence[str] = INPUTS,
        direction: str = "noising",
        freeze_mlps: bool = False,
        normalise: bool = True,
    ) -> None:
        check_choice("direction", direction, ("denoising", "noising"))
        self.inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        for each in self.inputs or ("",):
            check_choice("inputs", each, INPUTS)
        to_logits = isinstance(receivers, str) and receivers == "logits"
        self.receivers: HeadSet | Pairs | str = "logits" if to_logits else keep_heads(receivers)
        self.direction, self.freeze_mlps, self.normalise = direction, freeze_mlps, normalise

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        told = {"direction": self.direction, "freeze_mlps": self.freeze_mlps, "normalise": self.normalise}
        if isinstance(self.receivers, str):
            return {"receivers": self.receivers, **told}
        return {"receivers": head_names(self.receivers), "inputs": list(self.inputs), **told}

    def run(
        self,
        model: Model,
        pairs: Any,
        *,
        objective: Any,
        checkpoint: str | Path | None = None,
        batch_size: int | None = None,
        compile: bool = False,
        progress: bool = True,
    ) -> HeadScores:
        """Measure every sender's effect; heads that come too late to reach a receiver have no score.

        Args:
            model: A `HookedMLLM`.
            pairs: (clean sample, corrupted sample), or several.
            objective: An `Objective`, or a function of the last prompt position's logits.
            checkpoint: A file in which values are kept; see `AblationEffect.run`.
            batch_size: Senders in a batch; None chooses by free memory.
            compile: See `Sweep`.
            progress: Show a progress bar.

        Raises:
            HeadError: for receivers that the model lacks, or in its first layer.
            LayoutError: for a pair of other token counts, naming both layouts.
            NumericsError: when the two runs of all pairs do not differ.
        """
        ready(checkpoint)
        items = as_pairs(pairs)
        how = {"checkpoint": checkpoint, "batch_size": batch_size, "compile": compile, "progress": progress}
        (clean, corrupted), variants, facts = self.sweep(model, items, objective, **how)
        effect, more = normalised(clean, corrupted, variants, self.direction, self.normalise)
        last, shape = self._last(model), (model.cfg.n_layers, model.cfg.n_heads)
        values = np.full(shape, np.nan)
        values[:last] = effect.reshape(last, shape[1])
        counts = [facts["n_samples"] if layer < last else 0 for layer in range(shape[0])]
        return HeadScores(
            values, name="PathPatching", provenance={**facts, **more}, counts=counts, missing=range(last, shape[0])
        )

    def _heads(self, model: Model) -> HeadSet:
        return heads_of(self.receivers, model, "text")

    def _last(self, model: Model) -> int:
        """The number of layers whose heads can reach a receiver."""
        if self.receivers == "logits":
            return model.cfg.n_layers
        last = max(self._heads(model).by_layer)
        if last == 0:
            raise HeadError("Receivers in layer 0 receive nothing from other heads: take later ones.")
        return last

    def count(self, model: Model, items: Sequence[Any]) -> int:
        """One variant a sender."""
        return self._last(model) * model.cfg.n_heads

    def values(self, job: Job) -> None:
        """Every sender of one pair."""
        model, (clean, corrupted) = job.model, job.item
        bound, *runs = job.bound(model.resolve(clean), model.resolve(corrupted))
        job.runs[:] = np.stack([r.numpy() for r in runs])
        base, source = (corrupted, clean) if self.direction == "denoising" else (clean, corrupted)
        last, every = self._last(model), [*range(model.cfg.n_layers)]
        given = source_activations(model, source, "z", every[:last])
        held: Held = {"z": source_activations(model, base, "z", every)}
        if self.freeze_mlps:
            held["mlp_out"] = source_activations(model, base, "mlp_out", every)
        engine = job.engine(base, bound)
        senders = [
            HeadPatch([(layer, head)], given[layer]) for layer in every[:last] for head in range(model.cfg.n_heads)
        ]
        open_ = [p for p in prepare(model, senders, engine.inputs) if not job.known(p.number)]
        for layer in every[:last]:
            group = [p for p in open_ if p.layer == layer]
            sent = engine.batch.run(group, lambda part, layer=layer: self._sent(engine, part, layer, held))
            for part, found in sent:
                self._received(engine, part, found, job)

    def _sent(self, engine: Sweep, part: Sequence[Prepared], layer: int, held: Held) -> Any:
        """Run 2: the objective, or what reaches the receivers, `{hook name: [sample variant pos head d_head]}`."""
        model, shape = engine.model, (engine.inputs.batch, len(part))
        if self.receivers == "logits":
            with _frozen(model, held, layer):
                return engine.tail(part, layer)
        found: dict[str, Tensor] = {}
        added: list[tuple[HookPoint, Handle]] = []

        def keep(x: Tensor, hook: HookPoint) -> None:
            found[hook.name] = x.detach().unflatten(0, shape).clone()

        by_layer = self._heads(model).by_layer
        try:
            for receiver in by_layer:
                if receiver > layer:
                    for each in self.inputs:
                        added += model.registry.attach(f"blocks.{receiver}.attn.hook_{each}", keep, reads_only=True)
            with _frozen(model, held, layer):
                engine.forward(part, layer, max(by_layer) + 1)
        finally:
            model.registry.detach(added)
        return found

    def _received(self, engine: Sweep, part: Sequence[Prepared], found: Any, job: Job) -> None:
        numbers = [p.number for p in part]
        if self.receivers == "logits":
            job.store(numbers, found)
            return
        model = engine.model
        groups = model.cfg.n_heads // model.cfg.n_key_value_heads
        variants = []
        for place in range(len(part)):
            patches = []
            for layer, heads in self._heads(model).by_layer.items():
                for each in self.inputs:
                    name = f"blocks.{layer}.attn.hook_{each}"
                    if name in found:
                        inside = heads if each == "q" else sorted({head // groups for head in heads})
                        patches.append(ActivationPatch(each, {layer: found[name][:, place]}, heads=inside))
            variants.append(patches)
        job.store(numbers, engine.run(variants))

    def __repr__(self) -> str:
        return f"PathPatching({', '.join(f'{k}={v!r}' for k, v in self.config().items())})"


@contextmanager
def _frozen(model: Model, held: Held, layer: int) -> Iterator[None]:
    """Within it, heads behind a layer give what they give in the base run, and MLPs too if that is asked."""
    added: list[tuple[HookPoint, Handle]] = []
    try:
        for site, values in held.items():
            for behind, value in values.items():
                if behind > layer or (behind == layer and site == "mlp_out"):

                    def hold(x: Tensor, hook: HookPoint, value: Tensor = value) -> Tensor:
                        return value.to(x).repeat_interleave(len(x) // len(value), dim=0)

                    added += model.registry.attach(full_name((site, behind), {"text": model.cfg.n_layers}), hold)
        yield
    finally:
        model.registry.detach(added)
