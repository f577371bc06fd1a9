"""The ways to run a model's attention."""

import pytest
import torch

from helpers.bench_variants import TWO, variants
from hooked_mllm.bench import prefill_variants
from hooked_mllm.errors import InputError


def test_attention_removed_is_the_model_without_it(model):
    """Written out for the tiny Qwen3-VL: the output projection reads the queries."""
    (removed,) = variants("removed")
    ids = torch.arange(30)[None]
    with torch.no_grad(), removed.on(model):
        got = model(input_ids=ids, use_cache=False).last_hidden_state
    handles = []
    for layer in model.layers:
        attn, state = layer.self_attn, {}
        handles.append(attn.q_norm.register_forward_hook(lambda m, a, out, s=state: s.update(q=out)))

        def replace_input(module, args, s=state):
            cos, sin = model.rotary_emb(args[0], torch.arange(30).expand(3, 1, -1))
            q = s["q"]
            half = torch.cat([-q[..., 8:], q[..., :8]], -1)
            return ((q * cos[:, :, None] + half * sin[:, :, None]).flatten(2),)

        handles.append(attn.o_proj.register_forward_pre_hook(replace_input))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(got, expected)


def test_names_of_backends():
    with pytest.raises(InputError, match="No backend 'cudn'.*cudnn"):
        prefill_variants(["cudn"], {})
    with pytest.raises(InputError, match="needs numbers of dense heads"):
        prefill_variants(["hybrid"], {})
    names = [v.name for v in prefill_variants(["cudnn", "hybrid", "hybrid-compiled"], {2: TWO})]
    assert names == ["cudnn", "hybrid-2", "hybrid-2-compiled"]
