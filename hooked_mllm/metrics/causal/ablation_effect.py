"""AblationEffect: the loss of an objective without each head."""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np
from einops import rearrange
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model, Phase
from hooked_mllm.errors import HookValueError, InputError, LayoutError
from hooked_mllm.heads.head_scores import HeadScores
from hooked_mllm.heads.sample_scores import SampleScores
from hooked_mllm.inputs.positions import Positions, describe_positions
from hooked_mllm.inputs.resolve import ModelInputs, ResolvedInput, as_samples
from hooked_mllm.interventions import HeadAblation, HeadReference
from hooked_mllm.interventions.base import LayersLike, check_choice, keep_layers
from hooked_mllm.metrics.causal.swept import Job, SweepOptions, SweptMetric
from hooked_mllm.objectives.function import ObjectiveLike, as_objective
from hooked_mllm.storage import ready

if TYPE_CHECKING:
    #: the replacement of a head's z
    Mode = Literal["zero", "mean", "uniform", "scale"]
else:
    Mode = str

MODES = ("zero", "mean", "uniform", "scale")


class RunOptions(SweepOptions):
    """Arguments of `AblationEffect.run`; see there."""

    objective: ObjectiveLike


@checked
class AblationEffect(SweptMetric):
    r"""How much of an objective the model loses without each head, one head at a time.

    $$\mathrm{effect}[l, h] = \frac{1}{|D|} \sum_{x \in D}
    m(\text{model} \mid x) - m(\text{model without } (l, h) \mid x)$$

    $m$ is the objective. If smaller is better, as for KL, the sign is reversed: a positive effect means that the head
    helps. Single ablations underestimate redundant heads; `AblationCurve` ablates groups. Each head is a variant of one
    run, computed from its layer in batches (see `Sweep`).

    Args:
        mode: The replacement of the head's z: "zero", "mean", "uniform" or "scale", see `HeadAblation`.
        phase: The positions: those of the prompt ("prefill", with the last one, which predicts the answer's first
            token), those of a teacher-forced answer ("decode"), or all ("both").
        positions: Only these positions of the prompt.
        layers: Only heads of these layers; the others have no score.
        reference: For "mean": the result of `HeadAblation.reference`, or means `[layer head d_head]`.
        factor: For "scale".

    Source: arXiv:2606.05843, algorithm 2, for one head; the effect as in Wang et al. 2022 (arXiv:2211.00593).

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics, objectives, toys
        >>> model = HookedMLLM.from_pretrained("toy-internvl")
        >>> samples = toys.VisualRetrieval(pages=1).samples(model, 2, answer=True)
        >>> effect = metrics.AblationEffect(mode="zero", phase="both")
        >>> scores = effect.run(model, samples, objective=objectives.AnswerLogProb(), progress=False)
        >>> scores.shape
        (6, 8)
    """

    doing = "ablating heads"

    def __init__(
        self,
        *,
        mode: Mode,
        phase: Phase,
        positions: Positions | None = None,
        layers: LayersLike | None = None,
        reference: HeadReference | Tensor | None = None,
        factor: float | int | None = None,
    ) -> None:
        check_choice("mode", mode, MODES)
        check_choice("phase", phase, ("prefill", "decode", "both"))
        if positions is not None and phase == "decode":
            raise HookValueError("`positions` are those of the prompt, which phase='decode' does not edit.")
        self.mode: Mode = mode
        self.positions = positions
        self.phase: Phase = phase
        self.layers = None if layers is None else keep_layers(layers)
        self.reference, self.factor = reference, factor
        self._ablation((0, 0), None)  # raises for arguments that contradict each other

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        config = {"mode": self.mode, "phase": self.phase, "positions": describe_positions(self.positions)}
        config["layers"] = self._layers_config()
        if self.factor is not None:
            config["factor"] = self.factor
        if isinstance(self.reference, HeadReference):
            config["reference"] = self.reference.describe()
        return config

    @overload
    def run(
        self, model: Model, samples: ModelInputs, *, per_sample: Literal[False] = False, **options: Unpack[RunOptions]
    ) -> HeadScores: ...

    @overload
    def run(
        self, model: Model, samples: ModelInputs, *, per_sample: Literal[True], **options: Unpack[RunOptions]
    ) -> SampleScores: ...

    def run(
        self,
        model: Model,
        samples: ModelInputs,
        *,
        objective: ObjectiveLike,
        per_sample: bool = False,
        checkpoint: str | PathLike[str] | None = None,
        batch_size: int | None = None,
        compile: bool = False,
        progress: bool = True,
    ) -> HeadScores | SampleScores:
        """Measure the effect of every head.

        Args:
            model: A `HookedMLLM`.
            samples: Samples, batches or mappings; one, or several, with answers if the objective or phase needs them.
            objective: An `Objective`, or a function of the last prompt position's logits.
            per_sample: Return the effects of each sample instead of their mean.
            checkpoint: A file for the values, at intervals and when interrupted; a later call with the same samples,
                settings and file continues from there.
            batch_size: Heads in a batch; None: set by free memory.
            compile: See `Sweep`.
            progress: Show a progress bar.

        Raises:
            CacheFileError: For the checkpoint of another run.
            NumericsError: If an objective is not finite.
        """
        ready(checkpoint)
        options = SweepOptions(checkpoint=checkpoint, batch_size=batch_size, compile=compile, progress=progress)
        runs, variants, facts = self.sweep(model, as_samples(samples, "run"), objective, **options)
        sign = 1.0 if as_objective(objective).larger_is_better else -1.0
        facts["clean"] = float(runs[0].mean())
        layers, n_heads = self._layers(model), model.cfg.n_heads
        values = np.full((variants.shape[1], model.cfg.n_layers, n_heads), np.nan)
        effects = sign * (runs[0] - variants)  # [layer * head sample]
        values[:, layers] = rearrange(effects, "(layer head) sample -> sample layer head", head=n_heads)
        scores = SampleScores(values, name="AblationEffect", provenance=facts)
        return scores if per_sample else scores.mean()

    def count(self, model: Model, items: Sequence[Any]) -> int:
        """One variant for each head."""
        return len(self._layers(model)) * model.cfg.n_heads

    def values(self, job: Job) -> None:
        """Every head of a sample or batch."""
        engine = job.engine(job.item, job.goal)
        positions = ablated_positions(engine.inputs, self.phase, self.positions)
        heads = [(layer, head) for layer in self._layers(job.model) for head in range(job.model.cfg.n_heads)]
        job.runs[0] = engine.clean.numpy()
        engine.run([self._ablation(head, positions) for head in heads], skip=job.known, done=job.store)

    def _ablation(self, head: tuple[int, int], positions: Positions | None) -> HeadAblation:
        # a teacher-forced answer is part of the prefill: `positions` distinguish it from the prompt
        return HeadAblation(
            [head], mode=self.mode, phase="prefill", positions=positions, reference=self.reference, factor=self.factor
        )


def ablated_positions(inputs: ResolvedInput, phase: Phase, selected: Positions | None) -> Positions | None:
    """Positions of a phase in a teacher-forced run, of the prompt only the selected ones; None for all."""
    try:
        answer = inputs.mask("answer")
    except (InputError, LayoutError):  # no answer, or a mapping, whose answer is unknown
        if phase == "decode":
            raise InputError(
                "phase='decode' ablates heads at the answer's positions, and these samples have no answer: prepare "
                "them with answer=."
            ) from None
        return selected
    if phase == "decode":
        return answer
    if selected is None:
        return None if phase == "both" else ~answer
    prompt = inputs.mask(selected) & ~answer
    return prompt | answer if phase == "both" else prompt
