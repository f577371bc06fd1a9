"""The state of `model.measure` on disk, so that an interrupted run resumes, and what its scores were made under."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from hooked_mllm.contracts import Metric, Model
from hooked_mllm.errors import CacheFileError
from hooked_mllm.storage import Checkpoint, restoring

FORMAT = "hooked_mllm.measure/3"
#: numbers of a tensor that a fingerprint reads
NUMBERS = 1 << 16


class MeasureCheckpoint(Checkpoint):
    """The state of the metrics, set up for the model, and the names of the samples in it."""

    def __init__(
        self, path: str | PathLike[str] | None, metrics: Sequence[Metric], identity: Mapping[str, Any]
    ) -> None:
        super().__init__(path, FORMAT, identity)
        self.metrics = metrics
        self.done: list[str] = []
        #: the states after so many samples, in one tuple, as an interrupt may come between two assignments
        self._kept: tuple[list[dict[str, Tensor]], int] = [], 0
        self.without_records = False  # a file of an earlier version, without the ids of its samples

    def finished(self, name: str) -> None:
        """A sample is in all metrics: keep their states, for the next may be interrupted between two of them."""
        self.done.append(name)
        if self.path is not None:
            self._keep_states()

    def load(self) -> None:
        """Load the state of the file, if there is one, into the metrics."""
        kept = self.read()
        if kept is None:
            return
        tensors, header = kept
        with restoring(str(self.path)):
            settings, done = list(header["metrics"]), list(header["done"])
        if settings != [repr(m) for m in self.metrics]:
            raise CacheFileError(
                f"{self.path} was made with {', '.join(settings)}; this run measures "
                f"{', '.join(map(repr, self.metrics))}. Use another file, or the same metrics."
            )
        self.without_records = not any(name.endswith("/records") for name in tensors)
        with restoring(str(self.path)):
            for number, metric in enumerate(self.metrics):
                prefix = f"{number}/"
                state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                metric.load_state_dict(state)  # type: ignore[attr-defined]
        self.done = done
        self._keep_states()

    def _keep_states(self) -> None:
        states = [metric.state_dict() for metric in self.metrics]  # type: ignore[attr-defined]
        copies = [{name: value.detach().clone() for name, value in state.items()} for state in states]
        self._kept = copies, len(self.done)

    def save(self) -> None:
        """Write the state."""
        states, count = self._kept
        if states:
            tensors = {f"{number}/{name}": t for number, state in enumerate(states) for name, t in state.items()}
            self.write(tensors, metrics=[repr(m) for m in self.metrics], done=self.done[:count])


# -- what a score depends on -----------------------------------------------------------------------------------------


def identity_of(model: Model) -> dict[str, Any]:
    """What the scores of a run depend on beyond its metrics and samples, as values that JSON can hold.

    Interventions are distinguished by their descriptions and tensors, hooks of the user by the names of their points.
    """
    text, vision = model.wiring.switches["text"].base, model.wiring.switches["vision"].base
    facts: dict[str, Any] = {**model.info.provenance(), "weights": _weights(model)}
    if model.info.attention_settings is not None:
        facts["attention"] = text  # a backend's name may hold an address; its settings are compared
    facts["vision_attention"] = [vision, *sorted({_backend(s.running) for s in model.wiring.vision if s.running})]
    interventions: dict[int, Any] = {}
    edits: Counter[int] = Counter()  # one object may be active twice
    hooks = []
    for name, handles in model.registry.list_hooks(dir="fwd").items():
        for handle in handles:
            if handle.owner is not None:
                interventions.setdefault(id(handle.owner), handle.owner)
                edits[id(handle.owner)] += 1
            elif not handle.reads_only:
                hooks.append(name)
    facts["interventions"] = [
        {**each.describe(), "edits": edits[key], "content": _content(each)} for key, each in interventions.items()
    ]
    facts["hooks"] = hooks
    # of a value that JSON cannot hold, its type: its text may contain an address
    return json.loads(json.dumps(facts, default=lambda value: type(value).__name__))


def _backend(backend: object) -> str:
    describe = getattr(backend, "describe", None)
    return json.dumps(describe()) if describe else getattr(backend, "__name__", type(backend).__name__)


def _weights(model: Model) -> str:
    """One number of each parameter: two models in memory, or in a folder written again, may share a name."""
    numbers: dict[torch.device, list[Tensor]] = {}
    for value in model.hf_model.parameters():
        # sharded and absent weights cannot be read in this way
        if type(value.data) is Tensor and value.device.type != "meta" and value.numel():
            number = value.detach()[tuple(size // 2 for size in value.shape)]
            numbers.setdefault(value.device, []).append(number.float())
    digest = hashlib.sha256()
    for device_numbers in numbers.values():
        digest.update(torch.stack(device_numbers).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sampled_bytes(value: Tensor) -> bytes:
    """Evenly spaced numbers of a tensor."""
    flat = value.detach().reshape(-1)
    part = flat[:: max(1, len(flat) // NUMBERS)]
    return (part.float() if part.is_floating_point() else part).cpu().numpy().tobytes()


def _content(intervention: object) -> str:
    """A fingerprint of the tensors of an intervention, which its description leaves out."""
    digest = hashlib.sha256()

    def take(value: object) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + sampled_bytes(value))
        elif isinstance(value, dict):
            for key in value:
                digest.update(repr(key).encode())
                take(value[key])
        elif isinstance(value, list | tuple):
            for each in value:
                take(each)
        elif is_dataclass(value) and not isinstance(value, type):
            take(getattr(value, "__dict__", {}))

    take(getattr(intervention, "__dict__", {}))
    return digest.hexdigest()[:16]
