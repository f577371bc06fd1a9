"""Plain transformers with its eager attention replaced by one written out here, which may edit and records everything.

Nothing of the package is involved: the model is unwrapped, and `eager_attention_forward` of its modelling files is
patched for the time of a call.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from helpers.wrapped import fresh

Edit = Callable[[Tensor], Tensor]
ATTENTION = {
    "text": ("model.language_model.layers", "self_attn"),
    "vision": {
        "qwen3_vl": ("model.visual.blocks", "attn"),
        "qwen3_vl_moe": ("model.visual.blocks", "attn"),
        "llava_onevision": ("model.vision_tower.encoder.layers", "self_attn"),
        "internvl": ("model.vision_tower.encoder.layer", "attention"),
    },
}


def attention_module(model: nn.Module, family: str, tower: str, layer: int) -> nn.Module:
    """The attention module of one block."""
    blocks, name = ATTENTION["text"] if tower == "text" else ATTENTION["vision"][family]
    return model.get_submodule(f"{blocks}.{layer}.{name}")


class Reference:
    """An unwrapped model whose eager attention can be edited; `seen` holds what each attention module computed."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.model: Any = fresh(family, "eager")
        self.edits: dict[tuple[nn.Module, str], Edit] = {}
        self.seen: dict[tuple[nn.Module, str], Tensor] = {}

    def module(self, tower: str, layer: int) -> nn.Module:
        return attention_module(self.model, self.family, tower, layer)

    def _at(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        change = self.edits.get((module, name))
        x = x if change is None else change(x)
        self.seen[module, name] = x
        return x

    def _attention(self, module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        query, key, value = (
            self._at(module, name, x.transpose(1, 2)).transpose(1, 2)
            for name, x in (("rot_q", query), ("rot_k", key), ("v", value))
        )
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
        if attention_mask is not None:
            scores = scores + attention_mask
        scores = self._at(module, "attn_scores", scores)
        exp = torch.exp(scores - scores.amax(-1, keepdim=True))
        pattern = self._at(module, "pattern", exp / exp.sum(-1, keepdim=True))
        z = self._at(module, "z", torch.einsum("bhqk,bhkd->bqhd", pattern, value).contiguous())
        return z, pattern

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Within it, eager attention is the one above."""
        files = {sys.modules[type(self.module(t, 0)).__module__] for t in ("text", "vision")}
        with ExitStack() as stack:
            for file in files:
                stack.enter_context(patch.object(file, "eager_attention_forward", self._attention))
            yield

    def __call__(self, inputs: dict[str, Tensor], edits: dict[tuple[str, int, str], Edit]) -> Tensor:
        """Logits with edits by tower, layer and activation name."""
        self.seen = {}
        self.edits = {(self.module(t, layer), name): fn for (t, layer, name), fn in edits.items()}
        with self.patched():
            return self.model(**inputs, use_cache=False).logits
