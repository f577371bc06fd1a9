"""Which heads go together in a tile, and in which order tiles run."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Groups of heads that share keys and kind, as rows `[key-value head, number, head, head, ...]`.

    Dense groups come first, because they are the longest work, then whole groups that stream, then parts of groups.
    """

    rows: Tensor
    n_dense: int
    n_whole: int
    most: tuple[int, int]

    @property
    def n_streaming(self) -> int:
        """Groups, whole or not, whose heads stream."""
        return len(self.rows) - self.n_dense


@lru_cache(maxsize=4096)
def plan(dense: tuple[int, ...], n_heads: int, n_kv_heads: int, device: torch.device) -> Plan:
    """The plan for a layer.

    Rows are int32, on the device; `most` is the largest number of heads in a dense and in a streaming group.
    """
    size = n_heads // n_kv_heads
    chosen = set(dense)
    rows: list[list[int]] = []
    most: list[int] = []
    counts: list[int] = []
    for kind in (True, False):
        found = []
        for kv in range(n_kv_heads):
            heads = [h for h in range(kv * size, (kv + 1) * size) if (h in chosen) == kind]
            if heads:
                found.append([kv, len(heads), *heads, *[0] * (size - len(heads))])
        found.sort(key=lambda row: -row[1])
        most.append(max((row[1] for row in found), default=0))
        counts.append(len(found) if kind else sum(row[1] == size for row in found))
        rows += found
    return Plan(torch.tensor(rows, dtype=torch.int32).to(device), counts[0], counts[1], (most[0], most[1]))
