"""What a cache holds, as a short table."""

import re
from collections.abc import Mapping

import torch

from hooked_mllm.cache.lazy import Entry, LazyPattern, parts_of


def human_bytes(count: int) -> str:
    """A number of bytes with a binary unit.

    Examples:
        >>> human_bytes(3 * 2**20)
        '3.0 MiB'
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def ranges(numbers: list[int]) -> str:
    """Numbers as runs: `0-3, 5`."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def describe(entries: Mapping[str, Entry], nbytes: int) -> str:
    """One line for each kind of activation: which layers, shape, dtype, bytes held."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    held: dict[tuple[str, str, str], int] = {}
    for name, entry in entries.items():
        found = re.match(r"(.*?blocks\.)(\d+)(\..*)", name)
        label = f"{found[1]}*{found[3]}" if found else name
        form = "float32, when read" if isinstance(entry, LazyPattern) else str(entry.dtype).removeprefix("torch.")
        key = (label, str(list(entry.shape)), form)
        groups.setdefault(key, []).extend([int(found[2])] if found else [])
        held[key] = held.get(key, 0) + sum(t.nbytes for t in parts_of(entry) if isinstance(t, torch.Tensor))
    lines = [f"ActivationCache: {len(entries)} activations, {human_bytes(nbytes)}"]
    width = max((len(label) for label, _, _ in groups), default=0)
    for (label, shape, form), layers in groups.items():
        where = f"blocks {ranges(layers)}" if layers else ""
        lines.append(f"  {label:<{width}}  {where:<14} {shape:<22} {form:<20} {human_bytes(held[label, shape, form])}")
    return "\n".join(lines)
