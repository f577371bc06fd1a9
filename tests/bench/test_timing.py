"""Time and memory of a call, and which errors are no reason to stop."""

import pytest
import torch

from hooked_mllm.bench import timing
from hooked_mllm.bench.timing import clock_name, failure, milliseconds, peak_memory, used_devices


def test_what_is_no_reason_to_stop():
    assert failure(torch.OutOfMemoryError("full")) == "out of memory"
    assert failure(RuntimeError("No available kernel. Aborting execution.")) == "no such kernel"
    assert failure(RuntimeError("shapes differ")) is None


CPU = [torch.device("cpu")]


def test_the_time_of_a_call_is_that_of_the_clock(monkeypatch):
    times, calls = iter([10.0, 10.25]), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))
    assert milliseconds(lambda: calls.append(1), CPU) == pytest.approx(250.0) and calls == [1]


def test_without_a_gpu_no_memory_is_measured():
    calls = []
    assert peak_memory(lambda: calls.append(1), CPU) is None and calls == [1]


@pytest.mark.parametrize(
    ("devices", "clock"),
    [
        (CPU, "perf_counter, all devices synchronised"),
        ([torch.device("cuda", 0)], "CUDA events"),
        ([torch.device("cuda", 0), torch.device("cuda", 1)], "perf_counter, all devices synchronised"),
    ],
)
def test_the_clock_is_named(devices, clock):
    assert clock_name(devices) == clock


def test_devices_of_a_model_in_order():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"), torch.nn.Linear(2, 2), torch.nn.ReLU())
    assert used_devices(model) == [torch.device("meta"), torch.device("cpu")]
