"""The sizes of text decoders against published numbers."""

import pytest
import torch

from hooked_mllm.bench import SIZES

#: billions of parameters without embeddings, as the models' reports give them (arXiv:2505.09388, arXiv:2407.10671)
PUBLISHED = {"qwen3-vl-8b": 6.95, "qwen3-vl-32b": 31.2, "llava-onevision-7b": 6.53, "internvl3.5-8b": 6.95}
#: numbers of heads and of dense ones in table 2 of arXiv:2606.05843
TABLE_2 = {"qwen3-vl-8b": (1152, 20, 250), "qwen3-vl-32b": (4096, 50, 300), "llava-onevision-7b": (784, 20, 200)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    model = SIZES[name].empty(torch.bfloat16)
    count = sum(p.numel() for n, p in model.named_parameters() if "embed_tokens" not in n)
    assert count / 1e9 == pytest.approx(PUBLISHED[name], abs=0.01 * PUBLISHED[name])
    assert model.config.head_dim == 128 if name != "llava-onevision-7b" else model.layers[0].self_attn.head_dim == 128
    if name in TABLE_2:
        size = SIZES[name]
        assert (size.layers * size.heads, size.dense[0], size.dense[-1]) == TABLE_2[name]
