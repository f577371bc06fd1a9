"""AblationEffect: what the model loses without each head, one at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError, InputError, LayoutError
from hooked_mllm.heads.sample_scores import SampleScores
from hooked_mllm.inputs.positions import Positions, describe_positions
from hooked_mllm.inputs.resolve import ModelInputs, ResolvedInput, as_samples
from hooked_mllm.interventions import HeadAblation, HeadReference
from hooked_mllm.interventions.base import LayersLike, check_choice, keep_layers, layers_of
from hooked_mllm.metrics.causal.swept import Job, SweptMetric
from hooked_mllm.objectives import as_objective
from hooked_mllm.storage import ready

MODES = ("zero", "mean", "uniform", "scale")


class AblationEffect(SweptMetric):
    r"""How much of an objective the model loses without each head, one head at a time.

    $$\mathrm{effect}[l, h] = \frac{1}{|D|} \sum_{x \in D}
    m(\text{model} \mid x) - m(\text{model without } (l, h) \mid x)$$

    $m$ is the objective; for one of which less is better, such as KL, the sign is turned: a positive effect means that
    the head helps. Heads that do the same work hide each other: see `AblationCurve` for groups.

    Every head is a variant of one run, taken up at the head's layer, many in a batch (see `Sweep`).

    Args:
        mode: What the head's z becomes: "zero", "mean", "uniform" or "scale", see `HeadAblation`.
        phase: Where: at the prompt's positions ("prefill", which include the last one, from which the answer begins),
            at those of a teacher-forced answer ("decode"), or at all ("both").
        positions: Only these positions of the prompt; only they, and those behind them, are then run again.
        layers: Only heads of these layers; the others have no score.
        reference: For "mean": what `HeadAblation.reference` gives, or means `[layer head d_head]`.
        factor: For "scale".

    Raises:
        HookValueError: for arguments that are missing or contradict each other.

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
        mode: str,
        phase: str,
        positions: Positions | None = None,
        layers: LayersLike | None = None,
        reference: HeadReference | Tensor | None = None,
        factor: float | int | None = None,
    ) -> None:
        check_choice("mode", mode, MODES)
        check_choice("phase", phase, ("prefill", "decode", "both"))
        if positions is not None and phase == "decode":
            raise HookValueError("`positions` are those of the prompt, and phase='decode' leaves the prompt alone.")
        self.mode, self.phase, self.positions = mode, phase, positions
        self.layers = None if layers is None else keep_layers(layers)
        self.reference, self.factor = reference, factor
        self._ablation((0, 0), None)  # refuses arguments that contradict each other

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        config = {"mode": self.mode, "phase": self.phase, "positions": describe_positions(self.positions)}
        config |= {"layers": self.layers if self.layers is None or isinstance(self.layers, int) else [*self.layers]}
        if self.factor is not None:
            config["factor"] = self.factor
        if isinstance(self.reference, HeadReference):
            config["reference"] = self.reference.describe()
        return config

    def run(
        self,
        model: Model,
        samples: ModelInputs,
        *,
        objective: Any,
        per_sample: bool = False,
        checkpoint: str | Path | None = None,
        batch_size: int | None = None,
        compile: bool = False,
        progress: bool = True,
    ) -> Any:
        """Measure the effect of every head.

        Args:
            model: A `HookedMLLM`.
            samples: Samples, batches or mappings; one, or several.
            objective: An `Objective`, or a function of the last prompt position's logits.
            per_sample: Return the effects of every sample apart.
            checkpoint: A file in which values are kept now and then and when interrupted; a later call with the same
                samples, settings and file goes on where that one stopped.
            batch_size: Heads in a batch; None chooses by free memory.
            compile: See `Sweep`.
            progress: Show a progress bar.

        Returns:
            HeadScores, or SampleScores with `per_sample`.

        Raises:
            InputError: for no sample, or answers that the objective or the phase needs.
            CacheFileError: for the checkpoint of another run.
            NumericsError: when an objective is not finite.
        """
        ready(checkpoint)
        items = as_samples(samples, "run")
        how = {"checkpoint": checkpoint, "batch_size": batch_size, "compile": compile, "progress": progress}
        runs, variants, facts = self.sweep(model, items, objective, **how)
        sign = 1.0 if as_objective(objective).larger_is_better else -1.0
        facts["clean"] = float(runs[0].mean())
        chosen = self._layers(model)
        values = np.full((variants.shape[1], model.cfg.n_layers, model.cfg.n_heads), np.nan)
        values[:, chosen] = (sign * (runs[0] - variants)).T.reshape(-1, len(chosen), model.cfg.n_heads)
        scores = SampleScores(values, name="AblationEffect", provenance=facts)
        return scores if per_sample else scores.mean()

    def _layers(self, model: Model) -> list[int]:
        count = model.cfg.n_layers
        return [*range(count)] if self.layers is None else layers_of(self.layers, count, "text")

    def count(self, model: Model, items: Sequence[Any]) -> int:
        """One variant a head."""
        return len(self._layers(model)) * model.cfg.n_heads

    def values(self, job: Job) -> None:
        """Every head of one sample or batch."""
        engine = job.engine(job.item, job.goal)
        where = ablated_positions(engine.inputs, self.phase, self.positions)
        heads = [(layer, head) for layer in self._layers(job.model) for head in range(job.model.cfg.n_heads)]
        job.runs[0] = engine.clean.numpy()
        engine.run([self._ablation(head, where) for head in heads], skip=job.known, done=job.store)

    def _ablation(self, head: tuple[int, int], where: Positions | None) -> HeadAblation:
        return HeadAblation(
            [head], mode=self.mode, phase="prefill", positions=where, reference=self.reference, factor=self.factor
        )

    def __repr__(self) -> str:
        return f"AblationEffect({', '.join(f'{k}={v!r}' for k, v in self.config().items() if v is not None)})"


def ablated_positions(inputs: ResolvedInput, phase: str, wanted: Positions | None) -> Positions | None:
    """Positions of a teacher-forced run that belong to a phase; None for all.

    Args:
        inputs: A prompt, with an answer or without.
        phase: "prefill" for the prompt, "decode" for the answer, "both".
        wanted: Positions of the prompt; None for all.

    Raises:
        InputError: for phase "decode" without an answer.
    """
    try:
        answer = inputs.mask("answer")
    except (InputError, LayoutError):  # no answer, or a mapping, whose answer is not known
        if phase == "decode":
            raise InputError(
                "phase='decode' takes heads away at the answer's positions, and these samples have no answer: prepare "
                "them with answer=."
            ) from None
        return wanted
    if phase == "decode":
        return answer
    prompt = ~answer
    if wanted is not None:
        selected = inputs.mask(wanted) & prompt
        return selected | answer if phase == "both" else selected
    return None if phase == "both" else prompt
