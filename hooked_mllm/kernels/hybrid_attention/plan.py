"""Which heads go together in a tile, and in which order tiles run."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=4096)
def plan(dense: tuple[int, ...], n_heads: int, n_kv_heads: int, device: torch.device) -> tuple[Tensor, int, int, int]:
    """Groups of heads that share keys and kind, as rows `[key-value head, number, head, head, ...]`.

    Dense groups come first: they are the longest work.

    Returns:
        The rows (int32, on the device), the number of dense groups, and the largest number of heads in a dense and in a
        streaming group.
    """
    size = n_heads // n_kv_heads
    chosen = set(dense)
    rows: list[list[int]] = []
    most: list[int] = []
    n_dense = 0
    for kind in (True, False):
        found = []
        for kv in range(n_kv_heads):
            heads = [h for h in range(kv * size, (kv + 1) * size) if (h in chosen) == kind]
            if heads:
                found.append([kv, len(heads), *heads, *[0] * (size - len(heads))])
        most.append(max((row[1] for row in found), default=0))
        rows += found
        if kind:
            n_dense = len(rows)
    return torch.tensor(rows, dtype=torch.int32).to(device), n_dense, most[0], most[1]
