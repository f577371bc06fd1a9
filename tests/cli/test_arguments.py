"""Values on the command line: numbers, lengths, devices, and their defaults."""

import argparse

import pytest
import torch

from hooked_mllm import metrics
from hooked_mllm.cli.arguments import DTYPES, METRICS, TOY, count, device_and_dtype, tokens, torch_device
from hooked_mllm.toys import bundled


@pytest.mark.parametrize(("text", "value"), [("1", 1), ("20", 20), ("007", 7)])
def test_counts(text, value):
    assert count(text) == value


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "many", ""])
def test_what_counts_nothing(text):
    with pytest.raises(argparse.ArgumentTypeError, match=rf"a whole number from 1 up, got {text!r}"):
        count(text)
    assert count("0", least=0) == 0


@pytest.mark.parametrize(("text", "value"), [("8192", 8192), ("8k", 8192), ("128K", 131072), ("2", 2)])
def test_numbers_of_tokens(text, value):
    assert tokens(text) == value


@pytest.mark.parametrize("text", ["1", "0k", "-8", "8kk", "8m", "k", ""])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(argparse.ArgumentTypeError, match="a number of tokens such as 8192 or 8k"):
        tokens(text)


def test_devices():
    assert torch_device("cpu") == "cpu"
    with pytest.raises(argparse.ArgumentTypeError, match="'gpu' is not a torch device"):
        torch_device("gpu")


@pytest.mark.parametrize("available", [False, True])
def test_a_cuda_device_needs_one(available, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    if available:
        assert torch_device("cuda:0") == "cuda:0"
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="'cuda:0' needs a CUDA device"):
            torch_device("cuda:0")


@pytest.mark.parametrize(
    ("available", "device", "dtype", "defaults"),
    [
        (False, None, None, ("cpu", "float32")),
        (True, None, None, ("cuda", "bfloat16")),
        (True, "cpu", None, ("cpu", "float32")),
        (False, None, "float16", ("cpu", "float16")),
        (True, "cuda:1", "float32", ("cuda:1", "float32")),
    ],
)
def test_defaults_of_device_and_dtype(available, device, dtype, defaults, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert device_and_dtype(argparse.Namespace(device=device, dtype=dtype)) == defaults
    if dtype is None:
        assert device_and_dtype(argparse.Namespace(device=device)) == defaults, "a command without --dtype"


def test_choices_are_there():
    assert all(issubclass(getattr(metrics, name), metrics.HeadMetric) for name in METRICS.values())
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)
    assert TOY in bundled()
