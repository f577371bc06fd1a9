"""The record of a prefill benchmark on disk: every raw time, settings, versions and hardware."""

import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

from hooked_mllm.errors import InputError
from hooked_mllm.storage import read_json, restoring, write_json
from hooked_mllm.version import __version__

KIND = "hooked_mllm prefill benchmark"


@dataclass
class Cell:
    """The times of one variant at one length."""

    context: int
    variant: str
    ms: list[float] = field(default_factory=list)
    #: the reason why there are no times, such as "out of memory"
    failed: str | None = None
    #: peak of the memory allocated on the fullest GPU, weights included, and the part that the forward pass allocated
    peak_gib: float | None = None
    added_gib: float | None = None
    #: seconds of the first warm-up forward pass, compilation included
    first_s: float | None = None
    #: number of the run of the command; variants take turns within a session only
    session: int = 0

    @property
    def mean(self) -> float:
        """The arithmetic mean of the timed forward passes."""
        return statistics.fmean(self.ms)

    @property
    def spread(self) -> float:
        """The standard deviation over the timed forward passes."""
        return statistics.stdev(self.ms) if len(self.ms) > 1 else 0.0


@dataclass
class PrefillRecord:
    """Times of variants at lengths.

    Args:
        settings: Settings of the benchmark; a record is continued only under the same settings.
        sessions: Versions, devices and command of every run that added cells.
        titles: Variant -> its title in tables.
        checks: The comparisons made before timing.
        cells: The times.
    """

    settings: dict[str, Any]
    sessions: list[dict[str, Any]] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)

    def cell(self, context: int, variant: str) -> Cell | None:
        """The cell of a variant at a length; None if it was not measured."""
        return next((c for c in self.cells if (c.context, c.variant) == (context, variant)), None)

    @property
    def contexts(self) -> list[int]:
        """The lengths, ascending."""
        return sorted({cell.context for cell in self.cells})

    @property
    def base(self) -> str:
        """The variant that others are compared with: cuDNN, or SDPA if cuDNN was not timed."""
        return "cudnn" if "cudnn" in self.titles else "sdpa"

    def times(self, variant: str) -> dict[int, list[float]]:
        """Milliseconds of the timed forward passes of a variant, by length; lengths at which it failed are left out."""
        cells = (self.cell(context, variant) for context in self.contexts)
        return {cell.context: cell.ms for cell in cells if cell is not None and cell.ms}

    def speedup(self, context: int, variant: str, base: str) -> float | None:
        """Mean time of `base` divided by that of `variant`; None if one of them was not timed."""
        cell, base_cell = self.cell(context, variant), self.cell(context, base)
        return base_cell.mean / cell.mean if cell and base_cell and cell.ms and base_cell.ms else None

    def add(self, cells: Sequence[Cell]) -> None:
        """Add finished cells."""
        self.cells.extend(cells)
        self.cells.sort(key=lambda cell: cell.context)

    def save(self, path: str | Path) -> None:
        """Write it as JSON, or raise a `CacheFileError`."""
        write_json(Path(path), KIND, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "PrefillRecord":
        """Read what `save` wrote; a missing, damaged or other file raises a `CacheFileError`."""
        content = read_json(Path(path), KIND)
        content.pop("kind")
        with restoring(path):
            return cls(**{**content, "cells": [Cell(**cell) for cell in content["cells"]]})

    def continued(self, settings: Mapping[str, Any]) -> "PrefillRecord":
        """This record with `settings` added; settings that contradict its own raise an `InputError`."""
        shared = (settings.keys() & self.settings.keys()) - {"heads"}
        changed = sorted(key for key in shared if self.settings[key] != settings[key])
        heads, new_heads = self.settings.get("heads", {}), settings.get("heads", {})
        changed += [f"{k} dense heads" for k in heads if k in new_heads and heads[k] != new_heads[k]]
        if changed:
            raise InputError(
                f"The existing record has other settings ({', '.join(changed)}), so it cannot be continued: give "
                "another --out, or the same settings."
            )
        self.settings = {**settings, **self.settings, "heads": {**heads, **new_heads}}
        return self


def provenance(devices: Sequence[torch.device]) -> dict[str, Any]:
    """Versions and hardware."""
    gpus = [torch.cuda.get_device_name(d) for d in devices if d.type == "cuda"]
    return {
        "hooked_mllm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "devices": gpus or [f"{platform.machine()}, {torch.get_num_threads()} threads"],
    }


def _version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
