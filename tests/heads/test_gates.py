"""Head sets from DuoAttention's gates, against heads written out here."""

import numpy as np
import pytest
import torch

from hooked_mllm import HeadSet
from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.kernels.hybrid_attention import (
    heads_from_gates,
)

GATES = np.array([[0.9, 0.1, 0.5], [0.0, 1.0, 0.49]])


@pytest.mark.parametrize("as_type", [np.array, np.ndarray.tolist, torch.tensor, torch.HalfTensor])
def test_gates_of_key_value_heads(as_type):
    heads = heads_from_gates(as_type(GATES), n_heads=6)
    expected = [(layer, 2 * g + i) for layer, g in ((0, 0), (0, 2), (1, 1)) for i in range(2)]
    assert heads == HeadSet(expected, n_layers=2, n_heads=6)


def test_gates_of_query_heads_and_thresholds():
    assert set(heads_from_gates(GATES, n_heads=3, threshold=0.49)) == {(0, 0), (0, 2), (1, 1), (1, 2)}
    assert len(heads_from_gates(GATES, n_heads=3, threshold=0.0)) == 6
    assert len(heads_from_gates(GATES, n_heads=3, threshold=1.5)) == 0
    assert set(heads_from_gates([[1.02, -0.03]], n_heads=2, threshold=1.0)) == {(0, 0)}  # clipped


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_sparsity_is_exact_even_among_equal_gates(sparsity):
    gates = np.array([[1.0, 1.0, 0.3, 1.0], [1.0, 0.2, 1.0, 1.0]])
    heads = heads_from_gates(gates, n_heads=4, sparsity=sparsity)
    assert len(heads) == round(8 * (1 - sparsity))
    if sparsity == 0.25:
        assert (0, 2) not in heads and (1, 1) not in heads


def test_gates_from_a_file(tmp_path):
    np.savetxt(tmp_path / "full_attention_heads.tsv", GATES, delimiter="\t")
    read = np.loadtxt(tmp_path / "full_attention_heads.tsv", delimiter="\t")
    assert heads_from_gates(read, n_heads=6) == heads_from_gates(GATES, n_heads=6)


@pytest.mark.parametrize(
    ("gates", "settings", "error", "message"),
    [
        (torch.tensor([0.1, 0.9]), {}, InputError, r"\[layer, kv_head\]"),
        ([[0.1, 0.9], [0.3]], {}, InputError, "something else"),
        ([[0.1, float("nan")]], {}, InputError, "finite"),
        ([[0.1, 7.0]], {}, InputError, "7"),
        ([[]], {}, InputError, "shape"),
        ([[0.1, 0.2, 0.3]], {}, HeadError, "evenly"),
        ([[0.1, 0.2]], {"threshold": 0.5, "sparsity": 0.5}, InputError, "not both"),
        ([[0.1, 0.2]], {"sparsity": 1.5}, InputError, "share"),
        ([[0.1, 0.2]], {"threshold": float("nan")}, InputError, "threshold"),
    ],
)
def test_gates_that_are_none(gates, settings, error, message):
    with pytest.raises(error, match=message):
        heads_from_gates(gates, n_heads=4, **settings)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7, 0.9])
def test_a_gate_of_float32_reaches_the_number_that_it_was_rounded_from(threshold):
    gates = torch.tensor([[threshold, threshold - 1e-3], [threshold + 1e-3, 0.0]], dtype=torch.float32)
    assert str(heads_from_gates(gates, n_heads=2, threshold=threshold)) == "L0H0, L1H0"
