"""The state of a causal metric on disk, so that an interrupted run goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from hooked_mllm.errors import CacheFileError
from hooked_mllm.metrics.causal.ablation_result import from_lists, to_lists
from hooked_mllm.storage import read_json, write_json

KIND = "hooked_mllm.causal.checkpoint"


class CausalCheckpoint:
    """Values `[variant sample]`, NaN where none was measured yet, and what they were measured of.

    Args:
        path: The file; None keeps nothing.
        identity: What makes a run the same: settings, objective, model, heads, samples.
        shape: (variants, samples); of an ablation curve, its sets of heads.

    Raises:
        CacheFileError: if the file is damaged, or the checkpoint of another run.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any], shape: tuple[int, int]) -> None:
        self.path = None if path is None else Path(path)
        self.identity = json.loads(json.dumps(identity))  # as it will be read again
        self.values = np.full(shape, np.nan)
        self._since = 0
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def _load(self, path: Path) -> None:
        content = read_json(path, KIND)
        try:
            found, values = content["identity"], from_lists(content["values"])
        except (KeyError, TypeError, ValueError) as error:
            raise CacheFileError(f"{path} is damaged: {error!r}") from None
        names = [name for name in self.identity if found.get(name) != self.identity[name]]
        if names:
            raise CacheFileError(
                f"{path} is the checkpoint of another run: it differs in {', '.join(names)}. Use another file, or the "
                "same settings and samples."
            )
        if values.shape != self.values.shape:
            raise CacheFileError(f"{path} is damaged: expected values {self.values.shape}, got {values.shape}.")
        self.values = values

    def tick(self, save_every: int) -> None:
        """Another value is there; save when it is time to."""
        self._since += 1
        if self._since >= save_every:
            self.save()

    def save(self) -> None:
        """Write the state under a temporary name and rename it."""
        if self.path is not None and self._since:
            write_json(self.path, KIND, {"identity": self.identity, "values": to_lists(self.values)})
            self._since = 0
