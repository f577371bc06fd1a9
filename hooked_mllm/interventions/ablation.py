"""HeadAblation: remove the contribution of heads, by an explicit mode and in an explicit phase."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from hooked_mllm.cache import ActivationCache
from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model, Phase, Tower
from hooked_mllm.errors import HookValueError, InputError
from hooked_mllm.heads import HeadsLike, head_names
from hooked_mllm.hooks import HookPoint
from hooked_mllm.inputs.positions import Positions, describe_positions
from hooked_mllm.inputs.resolve import ModelInputs, each_sample, no_sample
from hooked_mllm.interventions.base import Edit, check_choice, heads_of, keep_heads, tower_shape
from hooked_mllm.interventions.edited_positions import EditedPositions, PositionIntervention, check_edited_positions
from hooked_mllm.interventions.reference import HeadReference, HeadSums
from hooked_mllm.interventions.source import Source
from hooked_mllm.kernels.streaming_window import head_flags

if TYPE_CHECKING:
    #: what z of an ablated head becomes
    Mode = Literal["zero", "mean", "resample", "uniform", "scale"]
    #: where "mean" and "resample" take z from
    Reference = HeadReference | ActivationCache | Tensor
else:  # at run time wider, so that another value reaches the check whose error lists the choices
    Mode, Reference = str, object

MODES: tuple[Mode, ...] = ("zero", "mean", "resample", "uniform", "scale")


@checked
class HeadAblation(PositionIntervention):
    r"""Remove the contribution of heads: their z, the input of the output projection, is replaced.

    Published code ablates heads in different ways, so that mode and phase are required and recorded.

    | mode | z of an ablated head becomes |
    | --- | --- |
    | `zero` | 0 |
    | `scale` | factor · z |
    | `mean` | its mean over the tokens of a set of samples |
    | `resample` | its z in another sample: at the same position of a cache, or of a token drawn from a set of samples |
    | `uniform` | the mean of v over the keys that the query sees (attention spread evenly) |

    Args:
        heads: "L20H15, L3H2", a pair (20, 15), a `HeadSet`, a boolean mask `[layer head]`, or a list of these; query
            heads of `tower`.
        mode: What z becomes.
        phase: "prefill" (the prompt's positions), "decode" (generated tokens), or "both".
        positions: Only these positions of the prompt: a token kind, a mask, indices, an index, a slice.
        reference: For "mean": the result of `HeadAblation.reference`, or means `[layer head d_head]`. For "resample":
            the cache of another run of the same length, or a reference made with `keep_tokens=True`.
        factor: For "scale".
        seed: For "resample" from a reference: which tokens are drawn, one for each position, the same for all heads.
        tower: "text" or "vision".

    Raises:
        HeadError: For an empty set of heads, or (when used) a head that the model lacks.
        HookValueError: For arguments that are missing or contradict each other.

    Examples:
        >>> from hooked_mllm import HeadAblation, HookedMLLM, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> ablation = HeadAblation(["L2H4", "L2H5", "L2H6", "L2H7"], mode="zero", phase="both")
        >>> with model.intervene(ablation) as records:
        ...     tokens = model.generate(sample, max_new_tokens=2, do_sample=False)
        >>> records[0]["applied"]
        {'prefill': 1, 'decode': 1}
    """

    def __init__(
        self,
        heads: HeadsLike,
        *,
        mode: Mode,
        phase: Phase,
        positions: Positions | None = None,
        reference: Reference | None = None,
        factor: float | int | None = None,
        seed: int | None = None,
        tower: Tower = "text",
    ) -> None:
        check_choice("mode", mode, MODES)
        check_edited_positions(positions, phase, tower)
        self.heads = keep_heads(heads)
        self.mode, self.phase, self.positions = mode, phase, positions
        self.factor, self.seed = factor, seed
        self.source: Any = reference
        self.tower: Tower = tower
        self._check_arguments()

    def _check_arguments(self) -> None:
        mode, source = self.mode, self.source
        if mode in ("mean", "resample") and source is None:
            how = "(model, samples, heads)"
            if mode == "resample":
                how = "(model, samples, heads, keep_tokens=True), or the cache of another run"
            raise HookValueError(f"mode={mode!r} needs a reference: HeadAblation.reference{how}.")
        if mode not in ("mean", "resample") and source is not None:
            raise HookValueError(f"mode={mode!r} takes no reference; 'mean' and 'resample' do.")
        if (mode == "scale") != (self.factor is not None):
            raise HookValueError(f"`factor` goes with mode='scale' and with no other; got {mode=}, {self.factor=}.")
        if self.factor is not None and not np.isfinite(self.factor):
            raise HookValueError(f"`factor` must be a finite number; got {self.factor!r}.")
        accepted: dict[str, tuple[Any, str]] = {
            "mean": (HeadReference | Tensor, "what HeadAblation.reference gives, or a tensor [layer head d_head]"),
            "resample": (
                HeadReference | ActivationCache,
                "the cache of another run, or what HeadAblation.reference gives with keep_tokens=True",
            ),
        }
        if mode in accepted and not isinstance(source, accepted[mode][0]):
            expected = f"The reference of mode={mode!r} is {accepted[mode][1]}"
            raise HookValueError(f"{expected}; got {type(source).__name__}.")
        drawn = mode == "resample" and isinstance(source, HeadReference)
        if mode == "resample" and isinstance(source, HeadReference) and (not source.tokens or self.seed is None):
            raise HookValueError("mode='resample' draws from a reference made with keep_tokens=True, by a `seed=`.")
        if isinstance(source, ActivationCache) and self.phase != "prefill":
            raise HookValueError(
                f"A cache has no z for tokens that are yet to be generated, so phase={self.phase!r} cannot "
                "resample from it: take phase='prefill', or a reference made with keep_tokens=True."
            )
        if self.seed is not None and not drawn:
            raise HookValueError("`seed` goes with mode='resample' and a reference of samples, where tokens are drawn.")

    @staticmethod
    @torch.no_grad()
    def reference(
        model: Model,
        samples: ModelInputs,
        heads: HeadsLike,
        *,
        positions: Positions | None = None,
        tower: Tower = "text",
        keep_tokens: bool = False,
    ) -> HeadReference:
        """Mean z of heads over the tokens of a set of samples, padding left out; one forward pass per sample.

        Args:
            model: A `HookedMLLM`.
            samples: Samples, batches or mappings; one, or an iterable of them.
            heads: The heads to average.
            positions: Only these positions of each sample.
            tower: "text" or "vision".
            keep_tokens: Also keep z of every token, for "resample".

        Raises:
            HeadError: For an empty set of heads, or a head that the model lacks.
            InputError: For no sample, or samples without images for the vision tower.

        Examples:
            >>> from hooked_mllm import HeadAblation, HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> samples = toys.VisualRetrieval(pages=1).samples(model, 3)
            >>> mean = HeadAblation.reference(model, samples[1:], ["L2H4"])
            >>> with model.intervene(HeadAblation(["L2H4"], mode="mean", phase="prefill", reference=mean)):
            ...     logits = model(samples[0])
        """
        check_edited_positions(positions, "prefill", tower)
        if tower != "text" and positions is not None:
            raise HookValueError("A reference of the vision tower is over all of its positions: leave positions out.")
        head_set, ids = heads_of(keep_heads(heads), model, tower), []
        total = HeadSums(head_set.by_layer, keep_tokens)
        names = [_point(tower, layer, "z") for layer in head_set.by_layer]
        for sample in each_sample(samples):
            inputs = model.resolve(sample)
            inputs.check_whole()
            if tower == "text":
                total.mask = ~inputs.padding if positions is None else ~inputs.padding & inputs.mask(positions)
            with model.registry.attached(names, total, reads_only=True):
                model.run_trunk(inputs)
            ids += inputs.ids
        if not ids:
            raise no_sample("average z over")
        if not all(total.counts[layer] for layer in head_set.by_layer):
            raise InputError(f"These samples have no positions in the {tower} tower: give samples with images.")
        mean = torch.full(_shape_of_means(model, tower), torch.nan)
        for layer, inside in head_set.by_layer.items():
            mean[layer, list(inside)] = (total.sums[layer] / total.counts[layer]).float()
        tokens = {layer: torch.cat(parts) for layer, parts in total.kept.items()}
        count = max(total.counts.values())  # the same in all layers
        return HeadReference(mean, head_set, count, len(ids), tower, describe_positions(positions), tuple(ids), tokens)

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        settings = {"mode": self.mode, "phase": self.phase, "positions": describe_positions(self.positions)}
        optional = {"factor": self.factor, "seed": self.seed, "reference": _described(self.source)}
        return {
            "intervention": "HeadAblation",
            "heads": head_names(self.heads),
            **settings,
            "tower": self.tower,
            **{name: value for name, value in optional.items() if value is not None},
        }

    def edits(self, model: Model) -> Iterator[tuple[str, Edit]]:
        """One edit in each layer that has heads of the set."""
        head_set = heads_of(self.heads, model, self.tower)
        if isinstance(self.source, HeadReference):
            self.source.check(head_set, self.tower)
        elif isinstance(self.source, Tensor) and self.source.shape != (shape := _shape_of_means(model, self.tower)):
            raise HookValueError(f"Means must be [layer head d_head] of {shape}; got {tuple(self.source.shape)}.")
        edited = EditedPositions(model, self.positions, self.phase, self.tower)
        for layer, inside in head_set.by_layer.items():
            name = _point(self.tower, layer, "attn_scores" if self.mode == "uniform" else "z")
            yield name, _uniform(edited, inside) if self.mode == "uniform" else self._edit(edited, layer, inside, name)

    def _edit(self, edited: EditedPositions, layer: int, inside: tuple[int, ...], name: str) -> Edit:
        source = Source(self.source, edited) if isinstance(self.source, ActivationCache) else None

        def edit(z: Tensor, hook: HookPoint) -> Tensor | None:
            mask = edited.mask(z.shape[0], z.shape[1], hook, z.device)
            if mask is None:
                return None
            # [batch pos] and [head] -> [batch pos head]
            ablated = mask[:, :, None] & head_flags(inside, z.shape[2], z.device)
            return torch.where(ablated[..., None], new(z, mask, hook), z)

        def new(z: Tensor, mask: Tensor, hook: HookPoint) -> Tensor:
            if self.mode == "zero":
                return torch.zeros_like(z)
            if self.mode == "scale":
                assert self.factor is not None
                return z * self.factor
            if self.mode == "mean":
                means = self.source.mean if isinstance(self.source, HeadReference) else self.source
                return means[layer].to(z)
            if source is not None:
                return source.fit(name, z, mask)
            tokens, kept_heads = self.source.tokens[layer], self.source.heads.by_layer[layer]
            index = _draw(self.seed, len(tokens), z.shape[0], z.shape[1], edited.offset(z.shape[1]))
            drawn = torch.zeros_like(z)
            drawn[:, :, list(inside)] = tokens[index][:, :, [kept_heads.index(head) for head in inside]].to(z)
            return drawn

        return edit


def _point(tower: Tower, layer: int, activation: str) -> str:
    return f"{'' if tower == 'text' else f'{tower}.'}blocks.{layer}.attn.hook_{activation}"


def _shape_of_means(model: Model, tower: Tower) -> tuple[int, int, int]:
    return (*tower_shape(model, tower), model.cfg.d_head if tower == "text" else model.cfg.vision_d_head)


def _uniform(edited: EditedPositions, inside: tuple[int, ...]) -> Edit:
    def edit(scores: Tensor, hook: HookPoint) -> Tensor | None:
        mask = edited.mask(scores.shape[0], scores.shape[2], hook, scores.device)
        if mask is None:
            return None
        # [batch query] and [head] -> [batch head query]
        ablated = mask[:, None, :] & head_flags(inside, scores.shape[1], scores.device)[:, None]
        visible = scores > torch.finfo(scores.dtype).min
        return scores.masked_fill(ablated[..., None] & visible, 0.0)

    return edit


def _draw(seed: int | None, n: int, batch: int, length: int, offset: int) -> Tensor:
    """The token drawn for each position: by seed, sample and position, so that decoding steps continue the sequence."""
    drawn = [np.random.default_rng([seed or 0, sample]).integers(n, size=offset + length) for sample in range(batch)]
    return torch.from_numpy(np.stack(drawn)[:, offset:])  # [batch pos]


def _described(source: HeadReference | ActivationCache | Tensor | None) -> Any:
    if isinstance(source, HeadReference):
        return source.describe()
    if isinstance(source, ActivationCache):
        return "the cache of another run"
    return None if source is None else f"means given as a tensor {tuple(source.shape)}"
