"""AttentionKnockout: forbid queries to see keys, before the softmax."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model, Phase, Tower
from hooked_mllm.errors import HookValueError, LayoutError
from hooked_mllm.heads import HeadsLike, head_names
from hooked_mllm.hooks import HookPoint
from hooked_mllm.inputs.positions import Positions, describe_positions
from hooked_mllm.interventions.base import (
    Edit,
    Intervention,
    LayersLike,
    heads_of,
    keep_heads,
    keep_layers,
    layer_list,
    layers_of,
    tower_shape,
)
from hooked_mllm.interventions.edited_positions import EditedPositions, check_edited_positions
from hooked_mllm.kernels.streaming_window import head_flags


@checked
class AttentionKnockout(Intervention):
    r"""Forbid queries to see keys: their scores become $-\infty$ before the softmax (Geva et al. 2023).

    The layer then runs through explicit attention under the model's own mask, and the rest of each row is renormalised.
    Keys are positions of the prompt; in decoding every generated token is a query.

    Args:
        heads: The heads in which it is forbidden, in any form that `HeadAblation` accepts; or
        layers: the layers, in all of their heads. One of the two.
        queries: Positions of the prompt that do not see the keys; None for all.
        keys: Positions of the prompt that are hidden.
        phase: "prefill" (queries of the prompt), "decode" (generated tokens), or "both".
        tower: "text" or "vision".

    Raises:
        HeadError: For an empty set of heads, or (when used) a head that the model lacks.
        HookNameError: For a layer that it lacks.
        HookValueError: For both or neither of heads and layers; in a run, for a query that would see nothing.

    Examples:
        >>> from hooked_mllm import AttentionKnockout, HookedMLLM, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> blind = AttentionKnockout(layers=[2], queries="last", keys="target", phase="prefill")
        >>> with model.intervene(blind):
        ...     logits, cache = model.run_with_cache(sample)
    """

    def __init__(
        self,
        heads: HeadsLike | None = None,
        queries: Positions | None = None,
        keys: Positions | None = None,
        *,
        phase: Phase,
        layers: LayersLike | None = None,
        tower: Tower = "text",
    ) -> None:
        if (heads is None) == (layers is None):
            raise HookValueError("Give the heads= or the layers= in which attention is knocked out, and not both.")
        if keys is None:
            raise HookValueError("Give the keys= to hide; with all of them hidden, a query has no visible key.")
        check_edited_positions(queries, phase, tower)
        check_edited_positions(keys, "prefill", tower)
        self.heads = None if heads is None else keep_heads(heads)
        self.layers = None if layers is None else keep_layers(layers)
        self.queries, self.keys, self.phase = queries, keys, phase
        self.tower: Tower = tower

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        layers = {"layers": layer_list(self.layers)}
        return {
            "intervention": "AttentionKnockout",
            **(layers if self.heads is None else {"heads": head_names(self.heads)}),
            "queries": describe_positions(self.queries),
            "keys": describe_positions(self.keys),
            "phase": self.phase,
            "tower": self.tower,
        }

    def edits(self, model: Model) -> Iterator[tuple[str, Edit]]:
        """One edit of the scores in each layer."""
        n_layers, n_heads = tower_shape(model, self.tower)
        if self.heads is None:
            assert self.layers is not None
            by_layer = dict.fromkeys(layers_of(self.layers, n_layers, self.tower), tuple(range(n_heads)))
        else:
            by_layer = heads_of(self.heads, model, self.tower).by_layer
        queries = EditedPositions(model, self.queries, self.phase, self.tower)
        keys = EditedPositions(model, self.keys, "prefill", self.tower)
        prefix = "" if self.tower == "text" else f"{self.tower}."
        for layer, inside in by_layer.items():
            yield f"{prefix}blocks.{layer}.attn.hook_attn_scores", _knock_out(queries, keys, inside)


def _knock_out(queries: EditedPositions, keys: EditedPositions, inside: tuple[int, ...]) -> Edit:
    def edit(scores: Tensor, hook: HookPoint) -> Tensor | None:
        batch, n_heads, q_length, kv_length = scores.shape
        query_mask = queries.mask(batch, q_length, hook, scores.device)
        if query_mask is None:
            return None
        # The keys are those of the KV cache, the prompt's first, in every step.
        prompt = keys.prompt_length(kv_length)
        if kv_length < min(prompt, queries.offset(q_length) + q_length):
            raise LayoutError(f"{hook.name} holds {kv_length} keys, fewer than the {prompt} tokens of the prompt.")
        key_mask = torch.zeros(batch, kv_length, dtype=torch.bool, device=scores.device)
        # a part of a prompt has no later keys
        key_mask[:, :prompt] = keys.prompt_mask(batch, prompt, scores.device)[:, :kv_length]
        flags = head_flags(inside, n_heads, scores.device)
        lowest = torch.finfo(scores.dtype).min
        # [head], [batch query] and [batch key] -> [batch head query key]
        blocked = flags[:, None, None] & query_mask[:, None, :, None] & key_mask[:, None, None, :]
        out = scores.masked_fill(blocked, lowest)
        emptied = (scores > lowest).any(-1) & ~(out > lowest).any(-1)
        if bool(emptied.any()):
            sample, head, query = emptied.nonzero()[0].tolist()
            raise HookValueError(
                f"The knockout at {hook.name} hides all that query {query} of sample {sample} sees in head {head}: "
                "a row of attention cannot be empty. Leave it a key, or take other `queries=`."
            )
        return out

    return edit


@checked
def knockout_windows(model: Model, k: int, tower: Tower = "text") -> list[range]:
    r"""Windows of k layers around each layer in turn, for a sweep of knockouts (Geva et al. 2023).

    Window l is $[\max(0, l - \lfloor k/2 \rfloor),\ \min(L, l + \lceil k/2 \rceil))$: shorter at both ends.

    Args:
        model: A `HookedMLLM`.
        k: Layers in a window.
        tower: "text" or "vision".

    Raises:
        HookValueError: For fewer than one layer, or more than the tower has.

    Examples:
        >>> from hooked_mllm import AttentionKnockout, HookedMLLM, interventions
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sweep = [AttentionKnockout(layers=window, queries="last", keys="visual", phase="prefill")
        ...          for window in interventions.knockout_windows(model, 3)]
        >>> sweep[0].layers, len(sweep) == model.cfg.n_layers
        ((0, 1), True)
    """
    count, _ = tower_shape(model, tower)
    if not 1 <= k <= count:
        raise HookValueError(f"A window holds 1 to {count} layers of this tower; got k={k}.")
    return [range(max(0, l - k // 2), min(count, l + (k + 1) // 2)) for l in range(count)]
