"""The number of variants in a batch: set by free memory, reduced when memory runs out."""

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch

from hooked_mllm.errors import HookValueError

T = TypeVar("T")
R = TypeVar("R")

#: tokens in a batch beyond which larger ones are no faster: matrix products are at their full rate
MAX_TOKENS = {"cuda": 8192, "cpu": 4096}
#: largest expected share of free memory that a batch takes
SHARE = 0.8
#: factor for the memory of edits and fragmentation
SLACK = 1.25


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device; None where that is unknown."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_bytes(device: torch.device, fn: Callable[[], object]) -> int:
    """The most bytes that `fn` allocates at any time."""
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class BatchSize:
    """The number of variants in a batch; `block` runs one block on a number of variants, to measure its memory."""

    def __init__(
        self,
        tokens: int,
        device: torch.device,
        size: int | None = None,
        block: Callable[[int], object] | None = None,
    ) -> None:
        if size is not None and size < 1:
            raise HookValueError(f"batch_size must be at least 1; got {size}.")
        self.shrunk = 0
        if size is not None:
            self.now = size
            return
        self.now = max(1, MAX_TOKENS["cuda" if device.type == "cuda" else "cpu"] // tokens)
        free = free_bytes(device)
        if free is not None and block is not None and self.now > 1:
            of_one, of_two = (peak_bytes(device, partial(block, n)) for n in (1, 2))
            per_variant = max(of_two - of_one, 1) * SLACK
            self.now = int(min(self.now, max(1.0, SHARE * free / per_variant)))

    def split(self, items: Sequence[T], factor: int = 1) -> Iterator[Sequence[T]]:
        """Batches of nearly equal size, of at most `factor * now` items at the time when each is taken."""
        while items:
            n_batches = -(-len(items) // (self.now * factor))
            size = -(-len(items) // n_batches)
            yield items[:size]
            items = items[size:]

    def run(
        self, items: Sequence[T], fn: Callable[[Sequence[T]], R], factor: int = 1
    ) -> Iterator[tuple[Sequence[T], R]]:
        """Call `fn` on batches of at most `factor * now` items; one that runs out of memory is repeated in halves."""
        for batch in self.split(items, factor):
            pending = [batch]
            while pending:
                part = pending.pop(0)
                try:
                    result = fn(part)
                except torch.OutOfMemoryError as error:
                    if len(part) == 1:
                        error.add_note(
                            "A single variant does not fit in memory in addition to the model: use a shorter sample, "
                            "or keep the residual streams on the CPU with offload='cpu'."
                        )
                        raise
                else:
                    yield part, result
                    continue
                # outside the handler, whose traceback would keep the batch's tensors alive
                while self.now > 1 and self.now * factor >= len(part):
                    self.now //= 2
                    self.shrunk += 1
                if torch.cuda.is_available():
                    gc.collect()
                    torch.cuda.empty_cache()
                half = -(-len(part) // 2)
                pending = [part[:half], part[half:], *pending]
