"""DuoGate: how much of its full attention each key-value head needs, by optimisation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mllm.cache.run import frozen_parameters
from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError, InputError, NumericsError
from hooked_mllm.heads import HeadScores
from hooked_mllm.heads.counting import Seed, check_seed
from hooked_mllm.inputs.positions import Positions, check_positions, describe_positions
from hooked_mllm.inputs.resolve import ModelInputs, ResolvedInput, as_samples
from hooked_mllm.kernels.streaming_window import WholeNumber, check_sink_and_window
from hooked_mllm.measuring.measure import fingerprint
from hooked_mllm.metrics.base import Configured
from hooked_mllm.metrics.gating import GateState, MixedAttention, last_hidden
from hooked_mllm.storage import ready


@checked
class DuoGate(Configured):
    r"""A gate per key-value head between full attention and a short window, optimised to change the model little.

    $$z = \alpha\,\text{full}(q,k,v) + (1-\alpha)\,\text{streaming}(q,k,v),\qquad
    \mathcal L = \frac{1}{|T|}\sum_{t\in T}\frac{1}{d}\lVert x_t - \tilde x_t\rVert^2 + \frac{\lambda}{LH}\sum|\alpha|$$

    - $\alpha\in[0,1]$: the score, one per layer and key-value head, shared by its query heads. It starts at 1 and is
      clamped after every step; the weights of the model do not change.
    - full: the model's own attention; streaming: of the keys that a query sees, the first `sink` tokens and the last
      `recent` (with its own), padding not counted.
    - $x, \tilde x$: the last hidden states (after the final norm) without and with the gates; $T$: `positions`.

    Heads with gates near 1 need distant tokens. Adam, one sample (or batch) a step, in a new random order for each
    pass; the learning rate rises from a tenth over the first fifth of the steps and falls back over the last.

    The released code differs: its full branch runs without gradients on the hidden states of the unmodified model, so
    that a gated layer mixes outputs of two streams; here both branches read the gated stream, as in the paper's formula
    and a deployed model. Its gates are clamped before a step and may be saved outside [0, 1]. Its block-sparse kernel
    rounds `sink` and `recent` up to blocks of 128 tokens. It deploys gates above 0.5 or above a quantile, ties broken
    by noise without a seed: here `result.top(share)` breaks them by layer and head.

    Args:
        sink: Number of first tokens that streaming heads see.
        recent: Number of last tokens that they see, at least 1.
        steps: Steps of the optimisation, at least 1.
        lr: Largest learning rate, above 0.
        l1: λ, at least 0.
        positions: T: "suffix" (from the question's first token to the end, with an answer), a token kind, a region, a
            mask, indices, a slice.
        seed: Seed of the order of the samples.

    Source: arXiv:2410.10819 (DuoAttention), section 3.2; defaults are the paper's.

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
        >>> samples = toys.VisualRetrieval(pages=1).samples(model, 2)
        >>> gate = metrics.DuoGate(sink=4, recent=16, steps=2, lr=0.1).run(model, samples, progress=False)
        >>> gate.shape, gate.to_query(model.cfg.n_heads).shape
        ((6, 4), (6, 8))
    """

    def __init__(
        self,
        *,
        sink: WholeNumber = 128,
        recent: WholeNumber = 256,
        steps: int = 2000,
        lr: float = 0.02,
        l1: float = 0.05,
        positions: Positions = "suffix",
        seed: Seed = 0,
    ) -> None:
        self.sink, self.recent = check_sink_and_window(sink, recent, "recent")
        if steps < 1:
            raise InputError(f"Expected steps >= 1; got {steps=}.")
        if not (lr > 0 and l1 >= 0):
            raise InputError(f"Expected lr > 0 and l1 >= 0; got {lr=}, {l1=}.")
        check_positions(positions)
        self.steps, self.lr, self.l1, self.positions, self.seed = steps, lr, l1, positions, check_seed(seed)

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        named = ("sink", "recent", "steps", "lr", "l1", "seed")
        return {**{n: getattr(self, n) for n in named}, "positions": describe_positions(self.positions)}

    def run(
        self,
        model: Model,
        samples: ModelInputs,
        *,
        checkpoint: str | Path | None = None,
        save_every: int = 100,
        progress: bool = True,
    ) -> HeadScores:
        """Optimise the gates: a forward and a backward pass for each step, and a forward pass for each sample.

        The same model, samples and settings give the same gates.

        Args:
            model: A `HookedMLLM`, not under an attention backend.
            samples: Samples, batches or mappings with a token layout; each is the input of a step.
            checkpoint: A file for the gates, at intervals and when interrupted; a later call with the same samples,
                settings and file continues from there.
            save_every: Steps between two savings.
            progress: Show a progress bar.

        Returns:
            `HeadScores` [layer kv_head]; `.to_query(model.cfg.n_heads)` has those of query heads.

        Raises:
            NumericsError: If the hidden states are not finite.
            CacheFileError: For a checkpoint of other settings or samples.
        """
        ready(checkpoint)
        sources = as_samples(samples, "optimise the gates on")
        if model.wiring.text[0].running is not None:
            raise HookValueError(
                f"DuoGate runs attention of its own in the place of {model.wiring.text[0].running!r}, and compares it "
                "with the model's: leave model.attention(...) first."
            )
        gates = torch.ones(model.cfg.n_layers, model.cfg.n_key_value_heads, device=model.device, requires_grad=True)
        samples_config = {"samples": [fingerprint(source) for source in sources]} if checkpoint is not None else {}
        state = GateState(checkpoint, gates, self.lr, {**self.config(), **samples_config})
        state.load()
        references: dict[int, Tensor] = {}
        start = len(state.distances)
        bar = tqdm(total=self.steps, initial=start, desc="optimising gates", unit="step", disable=not progress)
        try:
            with frozen_parameters(model):
                for step in range(start, self.steps):
                    epoch, index = divmod(step, len(sources))
                    number = int(np.random.default_rng([self.seed, epoch]).permutation(len(sources))[index])
                    inputs = model.resolve(sources[number])
                    inputs.check_whole()
                    positions = self._mask(inputs)
                    if number not in references:
                        with torch.no_grad():
                            references[number] = last_hidden(model, inputs, positions)
                    with torch.enable_grad():
                        distance = self._distance(model, inputs, positions, references[number], gates)
                        loss = distance + self.l1 * gates.abs().mean()
                    state.step(loss, float(distance.detach()), self.lr * self._warmup(step))
                    bar.set_postfix(distance=f"{state.distances[-1]:.3g}", refresh=False)
                    bar.update()
                    if (step + 1) % save_every == 0:
                        state.save()
        finally:  # an interrupt, too
            state.save()
            bar.close()
        provenance = {
            "metric": "DuoGate",
            "config": self.config(),
            **model.info.provenance(),
            "heads": "key-value",
            "n_samples": len(sources),
            "sample_ids": [i for source in sources for i in model.resolve(source).ids if i is not None],
            "distance": state.distances[-1],
        }
        return HeadScores(gates.detach(), name="DuoGate", provenance=provenance)

    def _warmup(self, step: int) -> float:
        """The share of the learning rate in a step: up over the first fifth, down over the last, at least 0.1."""
        return min(1.0, max(min(step + 1, self.steps - step) / (self.steps / 5), 0.1))

    def _mask(self, inputs: ResolvedInput) -> Bool[Tensor, "batch pos"]:
        if isinstance(self.positions, str) and self.positions == "suffix":
            # from the first token of the question [batch pos]
            suffix = inputs.mask("question").int().cummax(1).values.bool()
            return suffix & ~inputs.padding
        return inputs.mask(self.positions)

    def _distance(
        self, model: Model, inputs: ResolvedInput, positions: Tensor, reference: Tensor, gates: Tensor
    ) -> Float[Tensor, ""]:
        mixed = MixedAttention(gates, self.sink, self.recent, inputs.padding.to(model.device))
        with model.attention(mixed):
            hidden = last_hidden(model, inputs, positions)
        if len(mixed.layers) < model.cfg.n_layers:
            raise HookValueError(
                "A hook on attention scores or patterns keeps the gates from layers of their own: remove it, or "
                "intervene on z."
            )
        distance = (hidden - reference.to(hidden.device)).pow(2).mean()
        if not bool(torch.isfinite(distance)):
            raise NumericsError(
                "The hidden states are not finite. A model in float16 overflows: load it with dtype='bfloat16' or "
                "'float32'."
            )
        return distance.to(gates.device)
