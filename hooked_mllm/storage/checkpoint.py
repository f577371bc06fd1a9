"""Checkpoints: the arrays of a run that may be interrupted, and the identity of the run that they belong to."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_mllm.errors import CacheFileError
from hooked_mllm.storage.files import (
    from_lists,
    json_text,
    read_bytes,
    read_json,
    read_tensors,
    restoring,
    write_tensors,
)
from hooked_mllm.storage.writing import ready


class Checkpoint:
    """Arrays of a run that may be interrupted, in a file that states which run they belong to.

    Args:
        path: The file, checked to be writable; None keeps nothing.
        kind: The kind of the file.
        identity: What makes a run the same, as values that JSON can hold: model, settings, samples.

    Raises:
        CacheFileError: If the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, kind: str, identity: Mapping[str, Any]) -> None:
        self.path = ready(path)
        self.kind = kind
        self.identity = _parsed(identity)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the header that an earlier call of this run wrote; None where there is no file."""
        if self.path is None or not self.path.exists():
            return None
        tensors, header = read_tensors(self.path, self.kind)
        self.check(header)
        return tensors, header

    def write(self, tensors: Mapping[str, Tensor], **header: Any) -> None:
        """Write the tensors, the identity of the run and further entries of the header."""
        if self.path is not None:
            write_tensors(self.path, self.kind, tensors, {"identity": self.identity, **header})

    def check(self, header: Mapping[str, Any]) -> None:
        """Raise `CacheFileError` with the differences if the header of the file has another identity than this run."""
        with restoring(str(self.path)):
            # "settings" in files of earlier versions
            kept = _parsed(dict(header["settings"] if "settings" in header else header["identity"]))
        differences = []
        for name in {**self.identity, **kept}:
            if kept.get(name) != self.identity.get(name):
                texts = [json.dumps(identity.get(name)) for identity in (kept, self.identity)]
                short = max(map(len, texts)) <= 40
                differences.append(f"{name} ({texts[0]} in the file, {texts[1]} now)" if short else name)
        if differences:
            raise CacheFileError(
                f"{self.path} is the checkpoint of another run: it differs in {', '.join(differences)}. Use another "
                "file, or the same model, settings and samples."
            )


class ValueCheckpoint(Checkpoint):
    """A checkpoint of values `[variant sample]`, NaN where none was measured yet.

    Args:
        path: As in `Checkpoint`.
        identity: As in `Checkpoint`.
        shape: (variants, samples).

    Raises:
        CacheFileError: If the file cannot be written, is damaged, or is the checkpoint of another run.
    """

    KIND = "hooked_mllm.causal.checkpoint"

    def __init__(
        self, path: str | os.PathLike[str] | None, identity: Mapping[str, Any], shape: tuple[int, int]
    ) -> None:
        super().__init__(path, self.KIND, identity)
        self.values = np.full(shape, np.nan)  # [variant sample]
        self._unsaved = 0
        kept = self.read()
        if kept is not None:
            with restoring(str(self.path)):
                values = kept[0]["values"].numpy()
            if values.shape != shape:
                raise CacheFileError(f"{self.path} is damaged: expected values {shape}, got {values.shape}.")
            self.values = values.astype(np.float64)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """As `Checkpoint.read`; also the JSON files that earlier versions wrote."""
        if self.path is None or not self.path.is_file() or read_bytes(self.path, 1) != b"{":
            return super().read()
        header = read_json(self.path, self.kind)
        self.check(header)
        with restoring(self.path):
            return {"values": torch.from_numpy(from_lists(header["values"]))}, header

    def tick(self, save_every: int) -> None:
        """Count a new value; save after every `save_every` of them."""
        self._unsaved += 1
        if self._unsaved >= save_every:
            self.save()

    def save(self) -> None:
        """Write the values, if there are new ones."""
        if self._unsaved:
            self.write({"values": torch.from_numpy(self.values)})
            self._unsaved = 0


def _parsed(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity after a round trip through JSON; NaN and infinities, which JSON does not have, as text."""
    return json.loads(json_text(identity, allow_nan=True), parse_constant=str)
