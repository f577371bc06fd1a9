"""Small decoders of transformers, prompts, and hybrid attention registered under a name for them."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers.hybrid_witness import written_out
from hooked_mllm import register_hybrid_attention

NAME, SINK, WINDOW, HEADS, LAYERS = "test_hybrid", 2, 5, 4, 3
DENSE = {1: (2,), 2: (0, 1, 3)}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
CLASSES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
}


def decoder(kind, attn="eager", **more):
    model_class, config_class, own = CLASSES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config_class(**{**SIZES, **own, **more})
        return model_class._from_config(config, attn_implementation=attn).eval().requires_grad_(False)


def hidden(model, start, dense=DENSE):
    """Within it, `model`, of eager attention, is the witness."""
    return written_out([block.self_attn for block in model.model.layers], dense, start, SINK, WINDOW)


def prompts(batch=2, n=23, side="left"):
    ids = torch.randint(1, 96, (batch, n), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for b in range(1, batch):
        hidden = slice(0, 4 * b) if side == "left" else slice(n - 4 * b, n)
        mask[b, hidden] = ids[b, hidden] = 0
    return {"input_ids": ids, "attention_mask": mask}, tuple(mask.argmax(1).tolist())


def register(heads=None, **more):
    register_hybrid_attention(
        NAME, DENSE if heads is None else heads, **{"sink": SINK, "window": WINDOW, "implementation": "naive", **more}
    )


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)
