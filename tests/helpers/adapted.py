"""Tiny models with adapters of peft, wrapped, and the same models with the adapters merged into the weights."""

import copy
from typing import Any

import peft
import torch
from torch import Tensor

from helpers.tiny import tiny_processor
from helpers.wrapped import fresh
from hooked_mllm import HookedMLLM

OUTPUTS = ("o_proj", "out_proj", "attn.proj", "projection_layer")


def adapted(family: str, config: dict[str, Any] | None = None, **more: Any) -> tuple[HookedMLLM, Any, Any]:
    """The wrapped model, its PeftModel, and a plain model in which the adapter is merged."""
    hf_model = fresh(family)
    names = [n for n, _ in hf_model.named_modules() if n.endswith((*OUTPUTS, "lm_head")) and "mlp" not in n]
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 16, "target_modules": names, "init_lora_weights": False, **(config or {})}
    peft_model = peft.get_peft_model(hf_model, peft.LoraConfig(**options)).eval()
    merged = copy.deepcopy(peft_model).merge_and_unload()
    return HookedMLLM.from_model(peft_model.get_base_model(), tiny_processor(family), **more), peft_model, merged


def written(z: Tensor, weight: Tensor) -> Tensor:
    """What heads write under a weight `[d_model d_in]`, one head at a time: `[batch pos head d_model]`."""
    d_head = z.shape[-1]
    parts = [z[:, :, h] @ weight[:, h * d_head : (h + 1) * d_head].T for h in range(z.shape[2])]
    return torch.stack(parts, dim=2)


def output_weight(hf_model: Any, blocks: str, layer: int) -> Tensor:
    """The weight of the output projection of one block."""
    block = hf_model.get_submodule(f"{blocks}.{layer}")
    name = next(n for n, _ in block.named_modules() if n.endswith(OUTPUTS))
    return block.get_submodule(name).weight
