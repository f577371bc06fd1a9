"""Groups the heads that share a tile, and orders the tiles."""

from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Int32
from torch import Tensor


class Plan(NamedTuple):
    """Groups of heads that share keys and kind: dense (slowest), whole streaming groups, other streaming ones."""

    #: a row for each group: key-value head, number of heads, the heads, zeros
    rows: Int32[Tensor, "group entry"]
    n_dense: int
    #: streaming groups that contain all heads of their key-value head
    n_whole: int
    #: the largest number of heads in a dense and in a streaming group
    most: tuple[int, int]

    @property
    def n_streaming(self) -> int:
        """Number of streaming groups, whole or not."""
        return len(self.rows) - self.n_dense


@lru_cache(maxsize=4096)
def plan(dense: tuple[int, ...], n_heads: int, n_kv_heads: int, device: torch.device) -> Plan:
    """The plan of a layer with these dense heads, on the device."""
    size = n_heads // n_kv_heads
    dense_heads = set(dense)
    rows: list[list[int]] = []
    most: list[int] = []
    counts: list[int] = []
    for kind in (True, False):  # dense, then streaming
        groups = []
        for kv in range(n_kv_heads):
            heads = [head for head in range(kv * size, (kv + 1) * size) if (head in dense_heads) == kind]
            if heads:
                groups.append([kv, len(heads), *heads, *[0] * (size - len(heads))])
        groups.sort(key=lambda row: -row[1])
        most.append(max((row[1] for row in groups), default=0))
        counts.append(len(groups) if kind else sum(row[1] == size for row in groups))
        rows += groups
    return Plan(torch.tensor(rows, dtype=torch.int32).to(device), counts[0], counts[1], (most[0], most[1]))
