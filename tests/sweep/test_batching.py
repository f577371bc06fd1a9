"""The number of variants in a batch, and batches that run out of memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.intervention_witness import sample
from helpers.wrapped import wrapped
from hooked_mllm import HeadAblation
from hooked_mllm.errors import HookValueError
from hooked_mllm.objectives import LogitDifference
from hooked_mllm.sweep import Sweep
from hooked_mllm.sweep.batching import BatchSize

CPU = torch.device("cpu")


@given(st.integers(0, 200), st.integers(1, 40), st.integers(1, 5))
def test_batches_are_even_and_complete(n, now, factor):
    parts = list(BatchSize(1, CPU, now).split(range(n), factor))
    assert [i for part in parts for i in part] == list(range(n))
    sizes = [len(p) for p in parts]
    assert not sizes or (max(sizes) <= now * factor and max(sizes) - min(sizes) <= 1)
    assert len(parts) == -(-n // (now * factor))


@settings(max_examples=25, deadline=None)  # garbage is collected after each reduction
@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 12))
def test_out_of_memory_reduces_the_batch_and_no_item_runs_twice(n, now, fits):
    size, done = BatchSize(1, CPU, now), []

    def fn(part):
        if len(part) > fits:
            raise torch.OutOfMemoryError("raised by the test")
        done.extend(part)
        return len(part)

    assert sum(count for _, count in size.run(range(n), fn)) == n
    assert done == list(range(n))
    assert not size.shrunk or size.now < min(n, now)
    assert (size.shrunk > 0) == (min(n, now) > fits and -(-n // -(-n // now)) > fits)


def test_a_single_item_that_does_not_fit_raises_with_advice():
    def fn(part):
        raise torch.OutOfMemoryError("raised by the test")

    with pytest.raises(torch.OutOfMemoryError) as error:
        list(BatchSize(1, CPU, 4).run(range(3), fn))
    assert "offload='cpu'" in error.value.__notes__[0]


def test_long_samples_run_alone():
    assert BatchSize(10**6, CPU).now == 1
    assert BatchSize(1, CPU).now > BatchSize(100, CPU).now > 1
    with pytest.raises(HookValueError, match="at least 1; got 0"):
        BatchSize(1, CPU, 0)


def test_a_sweep_continues_after_running_out_of_memory(monkeypatch):
    model, inputs = wrapped("qwen3_vl"), sample("qwen3_vl")
    variants = [HeadAblation([(layer, h)], mode="zero", phase="both") for layer in range(3) for h in range(4)]
    sweep = Sweep(model, inputs, LogitDifference(5, wrong=9), batch_size=4)
    expected, resume = sweep.run(variants), sweep.trunk.resume

    def limited(layer, residual, *rest):
        if len(residual) > 2:
            raise torch.OutOfMemoryError("raised by the test")
        return resume(layer, residual, *rest)

    monkeypatch.setattr(sweep.trunk, "resume", limited)
    assert torch.allclose(sweep.run(variants), expected, atol=1e-6)
    assert sweep.batch.now == 2 and sweep.batch.shrunk == 1
    assert model.list_hooks() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's memory counters")
def test_the_batch_fits_free_memory():
    size = BatchSize(1, torch.device("cuda"), None, lambda n: torch.empty(n << 30, dtype=torch.uint8, device="cuda"))
    free, _ = torch.cuda.mem_get_info()
    assert 1 <= size.now <= free / (1 << 30)
