"""DirectLogitAttribution: what each head itself adds to the right answer's logit, over wrong ones."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mllm.contracts import Model
from hooked_mllm.corruptions.pair import as_samples_or_pairs
from hooked_mllm.errors import HeadError, NumericsError
from hooked_mllm.heads import HeadScores, SampleScores, head_name
from hooked_mllm.objectives import BoundObjective, LogitDifference
from hooked_mllm.objectives.tokens import Tokens
from hooked_mllm.storage import read_tensors, restoring, write_tensors
from hooked_mllm.wiring.results import head_results

KIND = "hooked_mllm.LogitDecomposition"


@dataclass(frozen=True, eq=False, repr=False)
class LogitDecomposition:
    """A logit difference taken apart: one number for each sample and component, which sum to it.

    Args:
        values: `[component sample]`, float64, in logits.
        labels: "embed", "L0H0", ..., and for each block l "l_mlp_out", where there are such "l_attn_bias" (of the
            output projection) and "l_deepstack", and "unembed_bias".
        total: The model's own logit difference, `[sample]`.
        shape: (layers, heads).
        provenance: JSON-able facts, as in `HeadScores`.
    """

    values: Float[Tensor, "component sample"]
    labels: tuple[str, ...]
    total: Float[Tensor, " sample"]
    shape: tuple[int, int]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, label: str) -> float:
        """The mean over samples of one component."""
        if label not in self.labels:
            raise HeadError(f"There is no component {label!r}: components are embed, L0H0, 0_mlp_out, ...")
        return float(self.values[self.labels.index(label)].mean())

    @property
    def heads(self) -> HeadScores:
        """The heads' components, averaged over samples."""
        return self.sample_heads.mean()

    @property
    def sample_heads(self) -> SampleScores:
        """The heads' components, sample by sample."""
        first = self.labels.index("L0H0")
        heads = self.values[first : first + self.shape[0] * self.shape[1]].unflatten(0, self.shape)
        return SampleScores(heads.permute(2, 0, 1), name="DirectLogitAttribution", provenance=self.provenance)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Raises:
            CacheFileError: If the file cannot be written.
        """
        header = {"labels": self.labels, "shape": self.shape, "provenance": self.provenance}
        write_tensors(Path(path), KIND, {"values": self.values, "total": self.total}, header)

    @classmethod
    def load(cls, path: str | Path) -> "LogitDecomposition":
        """Read what `save` wrote.

        Raises:
            CacheFileError: If the file is missing, damaged, a pickle, or holds something else.
        """
        tensors, header = read_tensors(Path(path), KIND)
        with restoring(path):
            labels, shape = tuple(header["labels"]), tuple(header["shape"])
            parts = cls(tensors["values"], labels, tensors["total"], shape, header["provenance"])
            if parts.values.shape != (len(labels), len(parts.total)):
                raise ValueError("its parts do not fit together")
            return parts

    def __repr__(self) -> str:
        total = float(self.total.mean())
        return f"LogitDecomposition({len(self.labels)} components of {len(self.total)} samples, mean total {total:.3g})"


class DirectLogitAttribution:
    r"""What each head writes straight into a logit difference, at the last position of the prompt.

    $$\mathrm{DLA}[l, h] = \Big\langle \frac{g \odot z_{l,h} W_O^{l,h}}{\sigma},\; u \Big\rangle,\qquad
    u = \frac{1}{|C|}\sum_{c\in C} W_U[c] - \frac{1}{|W|}\sum_{w\in W} W_U[w]$$

    - $\sigma, g$: scale and gain of the final norm; the scale is that of the whole stream in this run, held fixed, so
      that attributions add up.
    - $C, W$: correct and wrong tokens, as `LogitDifference` takes them.

    In logits, averaged over samples. Only the direct path counts: a head that others read from may score nothing here
    and be needed all the same. `decompose` gives every other component too; together they are the logit difference.

    Args:
        correct: The right token; None for the first token of the sample's own answer.
        wrong: The wrong tokens; None for the first token of the corrupted sample's answer.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2023
    (arXiv:2211.00593).

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics
        >>> from hooked_mllm.toys import VisualRetrieval
        >>> model, task = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32"), VisualRetrieval(pages=1)
        >>> samples = task.samples(model, 4, answer=True)
        >>> found = metrics.DirectLogitAttribution(wrong=task.answers).decompose(model, samples, progress=False)
        >>> bool(((found.values.sum(0) - found.total).abs() < 1e-3).all())
        True
        >>> found.heads.shape
        (6, 8)
    """

    def __init__(self, correct: Tokens | None = None, wrong: Tokens | None = None) -> None:
        self.objective = LogitDifference(correct, wrong)

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        return {name: value for name, value in self.objective.describe().items() if name != "objective"}

    def __repr__(self) -> str:
        return f"DirectLogitAttribution({', '.join(f'{k}={v!r}' for k, v in self.config().items() if v is not None)})"

    def run(self, model: Model, samples: Any, *, progress: bool = True) -> HeadScores:
        """Attribute the logit difference to heads: one forward pass a sample.

        Args:
            model: A `HookedMLLM`.
            samples: Samples, batches or mappings; or pairs, tuples (clean, corrupted), whose corrupted answer is the
                wrong one.
            progress: Show a progress bar.

        Returns:
            HeadScores [layer head], the mean over samples.

        Raises:
            InputError: for no sample, or tokens that `LogitDifference` refuses.
            NumericsError: when the model overflowed.
        """
        return self.decompose(model, samples, progress=progress).heads

    def decompose(self, model: Model, samples: Any, *, progress: bool = True) -> LogitDecomposition:
        """Attribute the logit difference to every component that writes to the last position's residual stream.

        Arguments and errors are those of `run`.
        """
        items = as_samples_or_pairs(samples, "attribute")
        parts, totals, ids, labels = [], [], [], ()
        for clean, corrupted in tqdm(items, desc="attributing logits", unit="sample", disable=not progress):
            inputs = model.resolve(clean)
            bound = self.objective.bind(model, inputs, None if corrupted is None else model.resolve(corrupted))
            labels, values, total = _attribute(model, clean, bound)
            parts.append(values)
            totals.append(total)
            ids += [i for i in inputs.ids if i is not None]
        facts = {"metric": "DirectLogitAttribution", "config": self.config(), **model.info.provenance()}
        values, total = torch.cat(parts, dim=1), torch.cat(totals)
        if not bool(torch.isfinite(values).all()):
            raise NumericsError("Attributions are not finite: the model overflowed. Load it with dtype='bfloat16'.")
        shape = (model.cfg.n_layers, model.cfg.n_heads)
        return LogitDecomposition(values, labels, total, shape, {**facts, **({"sample_ids": ids} if ids else {})})


@torch.no_grad()
def _attribute(model: Model, sample: Any, bound: BoundObjective) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Labels, attributions `[component batch]` and the model's own logit difference of one sample or batch."""
    names = ["hook_embed", "blocks.*.attn.hook_z", "blocks.*.hook_mlp_out", "ln_final.hook_scale"]
    names += ["blocks.*.hook_deepstack"] if model.cfg.n_deepstack else []
    kept = bound.positions.unique()  # early transformers 5 takes no row of positions for each sample
    place = torch.searchsorted(kept, bound.positions)
    # numbers and no tensor, which on several devices would be on another than the states
    logits, cache = model.run_with_cache(sample, names, pos_slice=bound.positions, logits_to_keep=kept.tolist())
    total = bound(logits.gather(1, place.to(logits.device)[..., None].expand(-1, -1, logits.shape[-1])))
    terms: dict[str, Tensor] = {"embed": cache["embed"].float()}
    rest: dict[str, Tensor] = {}
    for layer in range(model.cfg.n_layers):
        o_proj, z = model.output_projection(layer), cache["z", layer].float()
        heads = head_results(z, o_proj, z.device).unbind(-2)
        terms |= {head_name(layer, head): result for head, result in enumerate(heads)}
        if o_proj.bias is not None:
            rest[f"{layer}_attn_bias"] = o_proj.bias.to(z).expand_as(heads[0])
        rest[f"{layer}_mlp_out"] = cache["mlp_out", layer].float()
        if ("deepstack", layer) in cache:
            rest[f"{layer}_deepstack"] = cache["deepstack", layer].float()
    terms |= rest
    direction, bias = _direction(model, bound)
    scaled = cache.apply_ln_to_stack(torch.stack([term.to(direction.device) for term in terms.values()]))
    values = torch.einsum("cbpd,bd->cb", scaled.double(), direction.double()).cpu()
    labels = tuple(terms)
    if bias is not None:
        values, labels = torch.cat([values, bias[None].double().cpu()]), (*labels, "unembed_bias")
    return labels, values, total.double().cpu()


def _direction(model: Model, bound: BoundObjective) -> tuple[Float[Tensor, "batch d_model"], Tensor | None]:
    """What the difference is of the final stream: it is linear in the logits, and its gradient gives their weights."""
    with torch.enable_grad():
        logits = torch.zeros(*bound.positions.shape, model.cfg.d_vocab, requires_grad=True)
        (weights,) = torch.autograd.grad(bound(logits).sum(), logits)
    tokens = weights.flatten(0, 1).any(0).nonzero()[:, 0]
    head = model.lm_head
    chosen = weights[:, 0, tokens].to(head.weight.device)
    tokens = tokens.to(head.weight.device)
    bias = None if head.bias is None else chosen @ head.bias[tokens].float()
    return chosen @ head.weight[tokens].float(), bias
