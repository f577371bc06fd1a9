"""DirectLogitAttribution: the direct contribution of each head to a logit difference."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mllm.cache.run import CacheRequest, cached_forward
from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.corruptions.pair import Pairs, as_samples_or_pairs
from hooked_mllm.display.blocks import html_block, html_table
from hooked_mllm.errors import HeadError, NumericsError
from hooked_mllm.heads import HeadScores, SampleScores, head_name
from hooked_mllm.inputs.resolve import ModelInputs, ResolvedInput
from hooked_mllm.objectives import BoundObjective, LogitDifference, gather_logits
from hooked_mllm.objectives.logits import kept_positions
from hooked_mllm.objectives.tokens import Tokens
from hooked_mllm.storage import read_tensors, restoring, write_tensors
from hooked_mllm.wiring.results import head_results, value_at_zero

KIND = "hooked_mllm.LogitDecomposition"


@checked
@dataclass(frozen=True, eq=False, repr=False)
class LogitDecomposition:
    """The components of a logit difference for each sample; they sum to it.

    Args:
        values: `[component sample]`, float64, in logits.
        labels: "embed", "L0H0", ..., for each block l "l_mlp_out", and where the model has them "l_attn_bias" (of the
            output projection), "l_deepstack" and "unembed_bias".
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
        """The mean of one component over samples."""
        if label not in self.labels:
            raise HeadError(f"There is no component {label!r}: components are embed, L0H0, 0_mlp_out, ...")
        return float(self.values[self.labels.index(label)].mean())

    @property
    def heads(self) -> HeadScores:
        """The components of heads, averaged over samples."""
        return self.sample_heads.mean()

    @property
    def sample_heads(self) -> SampleScores:
        """The components of heads for each sample."""
        start, (n_layers, n_heads) = self.labels.index("L0H0"), self.shape
        heads = self.values[start : start + n_layers * n_heads]
        values = rearrange(heads, "(layer head) sample -> sample layer head", head=n_heads)
        return SampleScores(values, name="DirectLogitAttribution", provenance=self.provenance)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; raises a CacheFileError if that is not possible."""
        header = {"labels": self.labels, "shape": self.shape, "provenance": self.provenance}
        write_tensors(Path(path), KIND, {"values": self.values, "total": self.total}, header)

    @classmethod
    def load(cls, path: str | Path) -> "LogitDecomposition":
        """Read a file of `save`; raises a CacheFileError if it is missing, damaged, a pickle, or of another kind."""
        tensors, header = read_tensors(Path(path), KIND)
        with restoring(path):
            labels, shape = tuple(header["labels"]), tuple(header["shape"])
            values, total = tensors["values"], tensors["total"]
            if values.shape != (len(labels), len(total)):
                raise ValueError("its parts do not fit together")
            return cls(values, labels, total, shape, header["provenance"])

    def _repr_html_(self) -> str:
        means = self.values.mean(1)  # [component sample] -> [component]
        largest = means.abs().argsort(descending=True, stable=True)[:10].tolist()
        cells = [(self.labels[index], f"{float(means[index]):+.3f}") for index in largest]
        title = f"LogitDecomposition: {len(self.labels)} components, {len(self.total)} samples"
        note = f"the {len(cells)} largest; the total is {float(self.total.mean()):+.3f}"
        return html_block(title, html_table(cells, ("component", "logits"), align="<>", named=True), note=note)

    def __repr__(self) -> str:
        total = float(self.total.mean())
        return f"LogitDecomposition({len(self.labels)} components of {len(self.total)} samples, mean total {total:.3g})"


@checked
class DirectLogitAttribution:
    r"""The direct contribution of each head to a logit difference, at the last position of the prompt.

    $$\mathrm{DLA}[l, h] = \Big\langle \frac{g \odot z_{l,h} W_O^{l,h}}{\sigma},\; u \Big\rangle,\qquad
    u = \frac{1}{|C|}\sum_{c\in C} W_U[c] - \frac{1}{|W|}\sum_{w\in W} W_U[w]$$

    - $\sigma, g$: scale and gain of the final norm; the scale is that of the whole stream in this run, a constant, so
      that attributions add up.
    - $C, W$: correct and wrong tokens, as in `LogitDifference`.

    In logits, averaged over samples. Only the direct path is measured: a necessary head can have the score 0 if its
    output is an input of other heads. `decompose` returns all components, whose sum is the logit difference.

    Args:
        correct: The correct token; None for the first token of the sample's own answer.
        wrong: The wrong tokens; None for the first token of the corrupted sample's answer.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2023
    (arXiv:2211.00593).

    Examples:
        >>> from hooked_mllm import HookedMLLM, metrics, toys
        >>> model, task = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32"), toys.VisualRetrieval(pages=1)
        >>> samples = task.samples(model, 4, answer=True)
        >>> parts = metrics.DirectLogitAttribution(wrong=task.answers).decompose(model, samples, progress=False)
        >>> bool(((parts.values.sum(0) - parts.total).abs() < 1e-3).all())
        True
    """

    def __init__(self, correct: Tokens | None = None, wrong: Tokens | None = None) -> None:
        self.objective = LogitDifference(correct, wrong)

    def config(self) -> dict[str, Any]:
        """The settings, as values that JSON can hold."""
        return {name: value for name, value in self.objective.describe().items() if name != "objective"}

    def __repr__(self) -> str:
        return f"DirectLogitAttribution({', '.join(f'{k}={v!r}' for k, v in self.config().items() if v is not None)})"

    def run(self, model: Model, samples: ModelInputs | Pairs, *, progress: bool = True) -> HeadScores:
        """The mean attribution of each head, with one forward pass for each sample.

        Args:
            model: A `HookedMLLM`.
            samples: Samples, batches or mappings; or pairs (clean, corrupted), whose corrupted answer is the wrong one.
            progress: Show a progress bar.

        Raises:
            NumericsError: If the model overflowed.
        """
        return self.decompose(model, samples, progress=progress).heads

    def decompose(self, model: Model, samples: ModelInputs | Pairs, *, progress: bool = True) -> LogitDecomposition:
        """Attribute the logit difference to every component of the last position's residual stream; see `run`."""
        items = as_samples_or_pairs(samples, "attribute")
        parts, totals, ids, labels = [], [], [], ()
        for clean, corrupted in tqdm(items, desc="attributing logits", unit="sample", disable=not progress):
            inputs = model.resolve(clean)
            bound = self.objective.bind(model, inputs, None if corrupted is None else model.resolve(corrupted))
            labels, values, total = _attribute(model, inputs, bound)
            parts.append(values)
            totals.append(total)
            ids += [name for name in inputs.ids if name is not None]
        facts = {"metric": "DirectLogitAttribution", "config": self.config(), **model.info.provenance()}
        values, total = torch.cat(parts, dim=1), torch.cat(totals)
        if not bool(torch.isfinite(values).all()):
            raise NumericsError("Attributions are not finite: the model overflowed. Load it with dtype='bfloat16'.")
        shape = (model.cfg.n_layers, model.cfg.n_heads)
        return LogitDecomposition(values, labels, total, shape, {**facts, **({"sample_ids": ids} if ids else {})})


@torch.no_grad()
def _attribute(model: Model, inputs: ResolvedInput, bound: BoundObjective) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Labels, attributions `[component batch]` and the model's own logit difference of one sample or batch."""
    names = ["hook_embed", "blocks.*.attn.hook_z", "blocks.*.hook_mlp_out", "ln_final.hook_scale"]
    names += ["blocks.*.hook_deepstack"] if model.cfg.n_deepstack else []
    kept, index = kept_positions(bound.positions)
    request = CacheRequest(names_filter=names, pos_slice=bound.positions, forward={"logits_to_keep": kept})
    logits, cache = cached_forward(model, inputs, request)
    assert logits is not None
    total = bound(gather_logits(logits, index))
    # components of the stream at the last position, each [batch 1 d_model]
    terms: dict[str, Tensor] = {"embed": cache["embed"].float()}
    rest: dict[str, Tensor] = {}
    for layer in range(model.cfg.n_layers):
        o_proj, z = model.output_projection(layer), cache["z", layer]
        heads = head_results(z, o_proj, dtype=torch.float32).unbind(-2)  # head * [batch pos d_model]
        terms |= {head_name(layer, head): result for head, result in enumerate(heads)}
        if (at_zero := value_at_zero(o_proj, z.flatten(-2))) is not None:
            rest[f"{layer}_attn_bias"] = at_zero.to(heads[0]).expand_as(heads[0])
        rest[f"{layer}_mlp_out"] = cache["mlp_out", layer].float()
        if ("deepstack", layer) in cache:
            rest[f"{layer}_deepstack"] = cache["deepstack", layer].float()
    terms |= rest
    direction, bias = _direction(model, bound)
    stack = torch.stack([term.to(direction.device) for term in terms.values()])  # [component batch pos d_model]
    scaled, pattern = cache.apply_ln_to_stack(stack), "component batch pos d_model, batch d_model -> component batch"
    values = einsum(scaled.double(), direction.double(), pattern).cpu()
    labels = tuple(terms)
    if bias is not None:
        values, labels = torch.cat([values, bias[None].double().cpu()]), (*labels, "unembed_bias")
    return labels, values, total.double().cpu()


def _direction(model: Model, bound: BoundObjective) -> tuple[Float[Tensor, "batch d_model"], Tensor | None]:
    """The direction of the final stream whose inner product with it is the difference, and the unembedding's bias."""
    with torch.enable_grad():  # the difference is linear in the logits: the gradient is their weights
        logits = torch.zeros(*bound.positions.shape, model.cfg.d_vocab, requires_grad=True)
        (gradient,) = torch.autograd.grad(bound(logits).sum(), logits)
    tokens = gradient.flatten(0, 1).any(0).nonzero()[:, 0]  # [batch pos d_vocab] -> [token]
    unembedding = model.unembed(tokens, len(tokens)).float()  # [token d_model]
    bias = value_at_zero(model.lm_head, torch.zeros(model.cfg.d_model, dtype=model.dtype))  # [d_vocab]
    weights, tokens = gradient[:, 0, tokens].to(unembedding.device), tokens.to(unembedding.device)
    direction = weights @ unembedding  # [batch token] @ [token d_model]
    return direction, None if bias is None else weights @ bias.to(unembedding)[tokens]
