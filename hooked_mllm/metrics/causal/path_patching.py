"""PathPatching: the effect of a head along the direct path to other heads, or to the output."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike
from typing import Any

from torch import Tensor

from hooked_mllm.cache.keys import full_name
from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.corruptions.pair import Pairs
from hooked_mllm.errors import HeadError
from hooked_mllm.heads import HeadScores, HeadSet, HeadsLike, head_names
from hooked_mllm.heads.parsing import Pairs as HeadPairs
from hooked_mllm.hooks import HookPoint
from hooked_mllm.interventions import ActivationPatch, HeadPatch
from hooked_mllm.interventions.base import check_choice, heads_of, keep_heads
from hooked_mllm.metrics.causal.patching_effect import source_activations
from hooked_mllm.metrics.causal.swept import Direction, Job, PairedMetric, SweepOptions
from hooked_mllm.objectives.function import ObjectiveLike
from hooked_mllm.sweep import Sweep
from hooked_mllm.sweep.variant import Prepared, prepare

#: activations of a run by site and layer
Activations = dict[str, dict[int, Tensor]]
#: inputs of a receiver
INPUTS = ("q", "k", "v")


@checked
class PathPatching(PairedMetric):
    r"""The effect of each head along the direct path to the receivers.

    Three runs for each sender head: (1) the base and the source; (2) the base with the source's z in the sender and the
    base's z in every later head, so that the change passes through the residual stream (and MLPs, unless they are
    frozen) but through no other head; the receivers' inputs are recorded; (3) the base with these inputs in the
    receivers.

    $$\mathrm{effect}_{s \to R} = \frac{\sum_x m(\text{base} \mid R \leftarrow R(s)) - m(\text{base})}
    {\sum_x m(\text{source}) - m(\text{base})}$$

    With `receivers="logits"`, run 2 continues to the logits: the sender's direct effect.

    Args:
        receivers: A `HeadSet`, "L2H4, L3H1", pairs, a boolean mask `[layer head]`, or a list of these; or "logits".
        inputs: Their inputs that are patched: "q", "k", "v". Key and value are those of the whole key-value head.
        direction: "noising" or "denoising", as in `PatchingEffect`.
        freeze_mlps: In run 2, replace the outputs of MLPs by those of the base.
        normalise: Divide by the difference of the two runs.

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

    def __init__(
        self,
        receivers: HeadsLike,
        *,
        inputs: Sequence[str] = INPUTS,
        direction: Direction = "noising",
        freeze_mlps: bool = False,
        normalise: bool = True,
    ) -> None:
        check_choice("direction", direction, ("denoising", "noising"))
        self.inputs = (inputs,) if isinstance(inputs, str) else tuple(inputs)
        for each in self.inputs or ("",):
            check_choice("inputs", each, INPUTS)
        to_logits = isinstance(receivers, str) and receivers == "logits"
        self.receivers: HeadSet | HeadPairs | str = "logits" if to_logits else keep_heads(receivers)
        self.freeze_mlps, self.normalise = freeze_mlps, normalise
        self.direction = direction

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        settings = {"direction": self.direction, "freeze_mlps": self.freeze_mlps, "normalise": self.normalise}
        if isinstance(self.receivers, str):
            return {"receivers": self.receivers, **settings}
        return {"receivers": head_names(self.receivers), "inputs": list(self.inputs), **settings}

    def run(
        self,
        model: Model,
        pairs: Pairs,
        *,
        objective: ObjectiveLike,
        checkpoint: str | PathLike[str] | None = None,
        batch_size: int | None = None,
        compile: bool = False,
        progress: bool = True,
    ) -> HeadScores:
        """Measure every sender's effect; heads after all receivers have no score. See `PatchingEffect.run`.

        Raises:
            HeadError: For receivers that the model lacks, or in its first layer, which has no heads before it.
        """
        options = SweepOptions(checkpoint=checkpoint, batch_size=batch_size, compile=compile, progress=progress)
        _, effects, facts = self._effects(model, pairs, objective, options)
        grid = effects.reshape(-1, model.cfg.n_heads)  # [layer * head] -> [layer head]
        return self._head_scores(model, range(len(grid)), grid, facts, "PathPatching")

    def _heads(self, model: Model) -> HeadSet:
        return heads_of(self.receivers, model, "text")

    def _n_sending(self, model: Model) -> int:
        """The number of layers whose heads are before a receiver."""
        if self.receivers == "logits":
            return model.cfg.n_layers
        last_receiver = max(self._heads(model).by_layer)
        if last_receiver == 0:
            raise HeadError("Receivers in layer 0 have no heads before them: specify receivers in later layers.")
        return last_receiver

    def count(self, model: Model, items: Sequence[Any]) -> int:
        """One variant for each sender."""
        return self._n_sending(model) * model.cfg.n_heads

    def values(self, job: Job) -> None:
        """Every sender of a pair."""
        bound, model = job.run_pair(), job.model
        base, source = self._base_and_source(*job.item)
        layers, sending = [*range(model.cfg.n_layers)], [*range(self._n_sending(model))]
        source_z = source_activations(model, source, "z", sending)
        frozen: Activations = {"z": source_activations(model, base, "z", layers)}
        if self.freeze_mlps:
            frozen["mlp_out"] = source_activations(model, base, "mlp_out", layers)
        engine = job.engine(base, bound)
        senders = [
            HeadPatch([(layer, head)], source_z[layer]) for layer in sending for head in range(model.cfg.n_heads)
        ]
        remaining = [p for p in prepare(model, senders, engine.inputs) if not job.known(p.number)]
        for layer in sending:
            group = [p for p in remaining if p.layer == layer]
            if self.receivers == "logits":
                with _replaced(model, frozen, layer):
                    for part, values in engine.batch.run(group, partial(engine.tail, layer=layer)):
                        job.store([p.number for p in part], values)
            else:
                for part, inputs in engine.batch.run(group, partial(self._receiver_inputs, engine, frozen, layer)):
                    variants = [self._patches(model, inputs, index) for index in range(len(part))]
                    job.store([p.number for p in part], engine.run(variants))

    def _receiver_inputs(
        self, engine: Sweep, frozen: Activations, layer: int, part: Sequence[Prepared]
    ) -> dict[str, Tensor]:
        """Run 2: the receivers' inputs `[sample variant pos head d_head]` by hook name."""
        model, receiving = engine.model, self._heads(engine.model).by_layer
        recorded: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: HookPoint) -> None:
            # [row pos head d_head] -> [sample variant pos head d_head]
            recorded[hook.name] = x.detach().unflatten(0, (engine.inputs.batch, len(part))).clone()

        names = [_input_name(receiver, each) for receiver in receiving if receiver > layer for each in self.inputs]
        with model.registry.attached(names, keep, reads_only=True), _replaced(model, frozen, layer):
            engine.forward(part, layer, max(receiving) + 1)
        return recorded

    def _patches(self, model: Model, inputs: dict[str, Tensor], variant: int) -> list[ActivationPatch]:
        """Run 3 of a variant: the recorded inputs in its receivers."""
        group_size = model.cfg.n_heads // model.cfg.n_key_value_heads
        patches = []
        for layer, heads in self._heads(model).by_layer.items():
            for each in self.inputs:
                value = inputs.get(_input_name(layer, each))
                if value is not None:
                    patched = heads if each == "q" else sorted({head // group_size for head in heads})
                    patches.append(ActivationPatch(each, {layer: value[:, variant]}, heads=patched))
        return patches


def _input_name(layer: int, name: str) -> str:
    return f"blocks.{layer}.attn.hook_{name}"


@contextmanager
def _replaced(model: Model, activations: Activations, layer: int) -> Iterator[None]:
    """Replace z after a layer, and the outputs of MLPs from this layer, by those of a recorded run."""
    with ExitStack() as stack:
        for site, by_layer in activations.items():
            for later, value in by_layer.items():
                if later > layer or (later == layer and site == "mlp_out"):

                    def replace(x: Tensor, hook: HookPoint, value: Tensor = value) -> Tensor:
                        # [batch ...] -> [row ...]
                        return value.to(x).repeat_interleave(len(x) // len(value), dim=0)

                    name = full_name((site, later), {"text": model.cfg.n_layers})
                    stack.enter_context(model.registry.attached(name, replace))
        yield
