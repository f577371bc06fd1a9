"""Module paths and sizes of a stack of blocks."""

import pytest
import torch
from torch import nn
from transformers import Qwen2Config

from helpers.tiny import tiny_config
from hooked_mllm.errors import UnsupportedModelError
from hooked_mllm.families import BlockParts
from hooked_mllm.families.parts import QWEN_DECODER, decoder_sizes, has_module, projection_sizes


def test_a_head_dim_is_read_where_the_configuration_has_one():
    config = tiny_config("qwen3_vl").text_config
    assert decoder_sizes(config).d_head == 8
    config.head_dim = 24
    assert decoder_sizes(config).d_head == 24
    without = Qwen2Config(hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    assert decoder_sizes(without).d_head == 12


def test_a_projection_that_states_no_size_is_an_error_that_states_what_to_do():
    with pytest.raises(UnsupportedModelError, match="Identity does not state in_features.*override the sizes"):
        projection_sizes(torch.nn.Identity())


def test_a_block_needs_q_k_and_v_or_qkv():
    names = dict(ln1="a", attn="b", o="c", ln2="d", mlp="e", mlp_in="f", mlp_out="g")
    with pytest.raises(UnsupportedModelError, match=r"q, k and v, or qkv.*v=None\. Name the modules"):
        BlockParts(**names, q="q", k="k")
    assert BlockParts(**names, qkv="qkv").q is None


def block():
    """Norms of q and k, but no bare projections of k."""
    attention = nn.ModuleDict({"q_norm": nn.Identity(), "q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2)})
    return nn.ModuleDict({"self_attn": attention, "mlp": nn.Identity()})


@pytest.mark.parametrize(
    ("part", "path"),
    [
        ("q", "self_attn.q_norm"),  # the first path that the block has
        ("v", "self_attn.v_proj"),
        ("k", None),  # neither norm nor projection
        ("qkv", None),  # the family names none
        ("mlp", "mlp"),
        ("mlp_in", None),
        ("", ""),
    ],
)
def test_the_path_of_a_part_is_the_first_that_the_block_has(part, path):
    assert QWEN_DECODER.block.path(part, block()) == path


def test_a_tower_gives_its_blocks_in_order():
    layers = nn.ModuleList([nn.Linear(1, n) for n in (1, 2, 3)])
    model = nn.ModuleDict({"model": nn.ModuleDict({"language_model": nn.ModuleDict({"layers": layers})})})
    assert QWEN_DECODER.modules(model) == list(layers)


@pytest.mark.parametrize(
    ("path", "there"), [("", True), ("self_attn", True), ("self_attn.q_proj", True), ("attn", False)]
)
def test_whether_a_module_is_there(path, there):
    assert has_module(block(), path) == there


def test_widths_of_a_projection_are_those_of_its_weight():
    projection = nn.Linear(3, 7)
    assert projection_sizes(projection)[::-1] == tuple(projection.weight.shape)
