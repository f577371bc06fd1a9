"""Tiles and tables of the launches."""

import math

import numpy as np
import torch

from hooked_mllm.kernels.attention_profile.launch import HEADER, layer_table, settings_for, tile_shape


def test_tiles_hold_the_heads_of_a_group():
    assert tile_shape(256, 4, 64) == (4, 64) and tile_shape(128, 4, 64) == (2, 64)
    assert tile_shape(256, 7, 33) == (4, 64) and tile_shape(256, 4, 1) == (4, 4)
    assert tile_shape(256, 1, 900) == (1, 256) and tile_shape(32, 32, 1) == (32, 1)


def layers(n_layers, n_heads, n_keys):
    q = [torch.zeros(1, n_heads, 3, 8) for _ in range(n_layers)]
    k = [torch.zeros(1, 2, n_keys, 8) for _ in range(n_layers)]
    return q, k


def test_a_row_of_the_table_holds_addresses_scale_sizes_and_dense_heads():
    q, k = layers(3, 70, 20)
    table = layer_table(q, k, [0.25, 0.5, 1.0], [((0, 31, 32, 69), 4, 9), None, ((), 99, 50)])
    assert table.shape == (3, HEADER + 3)  # 70 heads are three words of 32 bits
    assert table[:, 0].tolist() == [x.data_ptr() for x in q] and table[:, 1].tolist() == [x.data_ptr() for x in k]
    scales = table[:, 2].astype(np.int32).view(np.float32)  # of exponents with base 2
    np.testing.assert_allclose(scales, np.array([0.25, 0.5, 1.0]) / math.log(2), rtol=1e-7)
    assert table[:, 3:HEADER].tolist() == [[4, 9], [0, 1], [20, 20]], "no larger than the number of keys"
    flags = [[int(table[layer, HEADER + head // 32]) >> head % 32 & 1 for head in range(70)] for layer in range(3)]
    assert flags == [[int(head in (0, 31, 32, 69)) for head in range(70)], [1] * 70, [0] * 70]


def test_a_table_of_dense_layers_has_no_flags():
    q, k = layers(2, 70, 20)
    assert layer_table(q, k, [1.0, 1.0], [None, None]).shape == (2, HEADER)


def test_wide_heads_have_fewer_stages():
    assert settings_for(128, torch.bfloat16)["num_stages"] > settings_for(256, torch.bfloat16)["num_stages"]
    assert settings_for(64, torch.float32)["ROWS"] < settings_for(64, torch.float16)["ROWS"]
