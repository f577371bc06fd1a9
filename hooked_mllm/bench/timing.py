"""Time and memory of one forward pass."""

import time
from collections.abc import Callable, Sequence

import torch


def used_devices(model: torch.nn.Module) -> list[torch.device]:
    """The devices of a model's parameters, in order of appearance."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def clock_name(devices: Sequence[torch.device]) -> str:
    """The clock that `milliseconds` uses on these devices."""
    if devices[0].type == "cuda" and len(devices) == 1:
        return "CUDA events"
    return "perf_counter, all devices synchronised"


def synchronise(devices: Sequence[torch.device]) -> None:
    """Wait for all work on the devices."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], object], devices: Sequence[torch.device]) -> float:
    """The time of one synchronised call: by CUDA events on one GPU, by the host's clock on several or on a CPU."""
    synchronise(devices)
    if devices[0].type == "cuda" and len(devices) == 1:
        with torch.cuda.device(devices[0]):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
        synchronise(devices)
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    synchronise(devices)
    return (time.perf_counter() - begin) * 1e3


def failure(error: RuntimeError) -> str | None:
    """The reason why a variant cannot be timed: no memory, or no kernel in a pinned backend; None for other errors."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return "no such kernel" if "No available kernel" in str(error) else None


def peak_memory(run: Callable[[], object], devices: Sequence[torch.device]) -> tuple[float, float] | None:
    """Run once; the peak of GiB allocated on the fullest GPU, and the part that the run added; None without a GPU."""
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        run()
        return None
    synchronise(gpus)
    before = [torch.cuda.memory_allocated(gpu) for gpu in gpus]
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    run()
    synchronise(gpus)
    peaks = [torch.cuda.max_memory_allocated(gpu) for gpu in gpus]
    fullest = max(range(len(gpus)), key=lambda i: peaks[i])
    return peaks[fullest] / 2**30, (peaks[fullest] - before[fullest]) / 2**30
