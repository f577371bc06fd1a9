"""How many variants go in one batch: from free memory, and fewer after running out of it."""

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from hooked_mllm.errors import HookValueError

T = TypeVar("T")

#: tokens in a batch beyond which larger ones are no faster: matrix products are at their full rate
MAX_TOKENS = {"cuda": 8192, "cpu": 4096}
#: share of free memory that a batch may be expected to take
SHARE = 0.8
#: what edits and fragmentation add to the memory of a block
SLACK = 1.25


def free_bytes(device: torch.device) -> int | None:
    """Bytes that could be allocated on a device; None where that is not known."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_bytes(device: torch.device, fn: Callable[[], Any]) -> int:
    """Bytes that `fn` needs at most beyond what is allocated before it."""
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class BatchSize:
    """The number of variants in a batch.

    Args:
        tokens: Tokens of one variant: samples times positions.
        device: Where the model runs.
        given: A number of the caller's own; it may still shrink.
        block: Runs one block on so many variants, to see what memory it takes.

    Attributes:
        now: Variants in a batch.
        shrunk: How often it had to shrink.
    """

    def __init__(
        self,
        tokens: int,
        device: torch.device,
        given: int | None = None,
        block: Callable[[int], Any] | None = None,
    ) -> None:
        if given is not None and given < 1:
            raise HookValueError(f"batch_size must be at least 1; got {given}.")
        self.shrunk = 0
        if given is not None:
            self.now = given
            return
        self.now = max(1, MAX_TOKENS["cuda" if device.type == "cuda" else "cpu"] // tokens)
        free = free_bytes(device)
        if free is not None and block is not None and self.now > 1:
            one, two = (peak_bytes(device, partial(block, n)) for n in (1, 2))
            each = max(two - one, 1) * SLACK
            self.now = int(min(self.now, max(1.0, SHARE * free / each)))

    def shrink(self) -> None:
        """Halve it."""
        self.now = max(1, self.now // 2)
        self.shrunk += 1

    def split(self, items: Sequence[T], more: int = 1) -> Iterator[Sequence[T]]:
        """Batches as even as they can be, none larger than `more` times what `now` is when it is taken."""
        start = 0
        while start < len(items):
            left = len(items) - start
            size = -(-left // -(-left // (self.now * more)))
            yield items[start : start + size]
            start += size

    def run(
        self, items: Sequence[T], fn: Callable[[Sequence[T]], Any], more: int = 1
    ) -> Iterator[tuple[Sequence[T], Any]]:
        """Call `fn` on batch after batch; one that runs out of memory is tried again in halves.

        Args:
            items: What to go through.
            fn: Called on each batch.
            more: So many times as many items go in a batch, where an item is smaller than usual.

        Raises:
            torch.OutOfMemoryError: when a single item does not fit.
        """
        for batch in self.split(items, more):
            pending = [batch]
            while pending:
                part = pending.pop(0)
                try:
                    result = fn(part)
                except torch.OutOfMemoryError as error:
                    if len(part) == 1:
                        error.add_note(
                            "One variant at a time does not fit beside the model: take a shorter sample, or keep the "
                            "residual streams elsewhere with offload='cpu'."
                        )
                        raise
                    result = None
                if result is None:  # outside the handler, whose traceback would keep the batch's tensors alive
                    while self.now > 1 and self.now * more >= len(part):
                        self.shrink()
                    if torch.cuda.is_available():
                        gc.collect()
                        torch.cuda.empty_cache()
                    half = -(-len(part) // 2)
                    pending = [part[:half], part[half:], *pending]
                    continue
                yield part, result
