"""What the kernels support, and the errors where they cannot run."""

import pytest
import torch

from hooked_mllm.errors import HookValueError
from hooked_mllm.kernels import implementations
from hooked_mllm.kernels.implementations import (
    check_implementation,
    check_triton,
    has_triton,
    kernel_fits,
    kernel_runs,
    supported,
)


@pytest.fixture
def no_triton(monkeypatch):
    """As in a build of torch without it."""
    monkeypatch.setattr(implementations, "find_spec", lambda name: None)
    has_triton.cache_clear()
    yield
    has_triton.cache_clear()


@pytest.mark.parametrize(
    ("d_head", "dtype", "fits"),
    [
        (15, torch.float16, False),
        (16, torch.float16, True),
        (256, torch.bfloat16, True),
        (257, torch.float32, False),
        (64, torch.float64, False),
        (64, torch.int32, False),
    ],
)
def test_widths_and_dtypes(d_head, dtype, fits):
    assert supported(d_head, dtype) == fits
    assert kernel_fits(d_head, dtype) == (fits and has_triton())


def test_without_triton_nothing_fits(no_triton):
    assert supported(64, torch.float32) and not kernel_fits(64, torch.float32)


@pytest.mark.parametrize(("interpreted", "runs"), [("1", True), ("0", False), (None, False)])
def test_off_a_gpu_kernels_run_in_the_interpreter_alone(interpreted, runs, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if interpreted is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    assert kernel_runs(torch.device("cpu")) == runs
    assert kernel_runs(torch.device("cuda", 1))


@pytest.mark.parametrize("name", ["auto", "triton", "naive"])
def test_known_implementations(name):
    assert check_implementation(name) is None


@pytest.mark.parametrize("name", ["cuda", "", "Triton"])
def test_unknown_implementations_are_named_with_the_known_ones(name):
    with pytest.raises(HookValueError, match=rf"'auto', 'triton', 'naive'\); got {name!r}"):
        check_implementation(name)


def test_why_a_kernel_cannot_be_used():
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(
        HookValueError, match=r"head dims 16 to 256 .* got 8 in torch\.float32\. implementation='naive'"
    ):
        check_triton(q, fits=False, runs=True)
    with pytest.raises(HookValueError, match=r"run on a GPU; q is on cpu\. implementation='naive' runs anywhere"):
        check_triton(q, fits=True, runs=False)
    assert check_triton(q, fits=True, runs=True) is None


def test_a_missing_triton_is_stated(no_triton):
    with pytest.raises(HookValueError, match="and Triton is not installed"):
        check_triton(torch.zeros(1, 2, 3, 64), fits=kernel_fits(64, torch.float32), runs=True)
