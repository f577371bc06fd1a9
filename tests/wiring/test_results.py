"""What each head writes, summed and left out."""

import pytest
import torch

from helpers.module_witness import VISION_BLOCKS, hooked_values
from helpers.wrapped import model_inputs, plain, wrapped


@pytest.mark.parametrize("prefix", ["", "vision."])
@torch.no_grad()
def test_head_results_add_up_to_the_attention_output(family, prefix):
    inputs, seen = model_inputs(family), hooked_values(family, model_inputs(family))
    blocks = "model.language_model.layers" if not prefix else VISION_BLOCKS[family]
    block = plain(family).get_submodule(f"{blocks}.1")
    projections = ("self_attn.o_proj", "attn.proj", "self_attn.out_proj", "attention.projection_layer")
    o = next(m for n, m in block.named_modules() if n in projections)
    total = seen[f"{prefix}blocks.1.attn.hook_result"].sum(-2)
    total = total if o.bias is None else total + o.bias
    gain = getattr(block, "lambda_1", 1.0)
    torch.testing.assert_close(gain * total, seen[f"{prefix}blocks.1.hook_attn_out"], atol=1e-5, rtol=1e-4)
    # one head's result removed is that head's z removed
    hooks = ([(f"{prefix}blocks.1.attn.hook_{p}", lambda x, hook: drop_head(x))] for p in ("result", "z"))
    results, zs = (wrapped(family).run_with_hooks(inputs, fwd_hooks=h) for h in hooks)
    torch.testing.assert_close(results, zs, atol=1e-4, rtol=1e-4)


def drop_head(x):
    out = x.clone()
    out[:, :, 1] = 0
    return out
