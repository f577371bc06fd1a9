"""The state of `model.measure` on disk, so that an interrupted run goes on, and what its scores were made under."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_mllm.contracts import Metric
from hooked_mllm.errors import CacheFileError

if TYPE_CHECKING:
    from hooked_mllm.model.hooked_mllm import HookedMLLM

FORMAT = "hooked_mllm.measure/3"
#: numbers of a tensor that a fingerprint reads
NUMBERS = 1 << 16
#: characters of a setting that an error shows
SHOWN = 60


class MeasureCheckpoint:
    """What the metrics hold, which samples are in it, and what a score depends on beside them.

    Args:
        path: The file; None keeps nothing.
        metrics: The metrics, set up for the model.
        identity: What makes a run the same, as `identity_of` tells it.
    """

    def __init__(self, path: str | Path | None, metrics: Sequence[Metric], identity: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.metrics = metrics
        # as it will be read again; of a value that JSON cannot hold, its kind, for its text may name an address
        self.identity = json.loads(json.dumps(identity, default=lambda value: type(value).__name__))
        self.done: list[str] = []
        self._states: list[dict[str, Tensor]] = []

    def finished(self, name: str) -> None:
        """A sample is in all metrics: keep their states, for the next may be interrupted between two of them."""
        self.done.append(name)
        if self.path is not None:
            self._states = [_state_of(metric) for metric in self.metrics]

    def load(self) -> None:
        """Give the metrics the state of the file, if it is there.

        Raises:
            CacheFileError: if the file is damaged, or the checkpoint of another run or of an older version.
        """
        if self.path is None or not self.path.is_file():
            return
        try:
            with safe_open(str(self.path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["hooked_mllm"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if header["format"] != FORMAT:
                raise CacheFileError(
                    f"{self.path} holds {header['format']!r}, expected {FORMAT!r}. A file of an older version does not "
                    "say under which attention and interventions its scores were made: use another file."
                )
            settings, found, done = header["metrics"], dict(header["identity"]), list(header["done"])
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            if isinstance(error, CacheFileError):
                raise
            raise CacheFileError(f"{self.path} is not a checkpoint of `measure` ({error!r}).") from error
        if settings != [repr(m) for m in self.metrics]:
            raise CacheFileError(
                f"{self.path} was made with {', '.join(settings)}; this run measures "
                f"{', '.join(map(repr, self.metrics))}. Use another file, or the same metrics."
            )
        names = [name for name in {**self.identity, **found} if found.get(name) != self.identity.get(name)]
        if names:
            told = ", ".join(_difference(name, found.get(name), self.identity.get(name)) for name in names)
            raise CacheFileError(
                f"{self.path} is the checkpoint of another run: it differs in {told}. Use another file, or the same "
                "model and settings."
            )
        for number, metric in enumerate(self.metrics):
            prefix = f"{number}/"
            state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            metric.load_state_dict(state)  # type: ignore[attr-defined]
        self.done = done
        self._states = [_state_of(metric) for metric in self.metrics]

    def save(self) -> None:
        """Write the state under a temporary name and rename it."""
        if self.path is None or not self._states:
            return
        tensors = {
            f"{number}/{name}": value.cpu().contiguous()
            for number, state in enumerate(self._states)
            for name, value in state.items()
        }
        header = {
            "format": FORMAT,
            "metrics": [repr(m) for m in self.metrics],
            "identity": self.identity,
            "done": self.done,
        }
        temporary = self.path.with_name(self.path.name + ".partial")
        try:
            save_file(tensors, str(temporary), metadata={"hooked_mllm": json.dumps(header)})
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _state_of(metric: Metric) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in metric.state_dict().items()}  # type: ignore[attr-defined]


def _difference(name: str, there: Any, here: Any) -> str:
    texts = [json.dumps(value) for value in (there, here)]
    return f"{name} ({texts[0]} in the file, {texts[1]} now)" if max(map(len, texts)) <= SHOWN else name


# -- what a score depends on -----------------------------------------------------------------------------------------


def identity_of(model: "HookedMLLM") -> dict[str, Any]:
    """What the scores of a run depend on beside its metrics and samples, as values that JSON can hold.

    Interventions are told apart by their descriptions and tensors, hooks of the user's own by where they hang.
    """
    text, vision = model.wiring.switches["text"].base, model.wiring.switches["vision"].base
    facts: dict[str, Any] = {**model.info.provenance(), "weights": _weights(model)}
    if model.info.attention_settings is not None:
        facts["attention"] = text  # a backend's name may hold an address; its settings are compared
    facts["vision_attention"] = [vision, *sorted({_backend(s.running) for s in model.wiring.vision if s.running})]
    interventions: dict[int, Any] = {}
    edits: Counter[int] = Counter()  # one object may be at work twice
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
    return facts


def _backend(backend: Any) -> str:
    describe = getattr(backend, "describe", None)
    return json.dumps(describe()) if describe else getattr(backend, "__name__", type(backend).__name__)


def _weights(model: "HookedMLLM") -> str:
    """One number of each parameter: a name does not tell two models in memory apart, nor a folder written anew."""
    numbers: dict[torch.device, list[Tensor]] = {}
    for value in model.hf_model.parameters():
        # sharded and absent weights cannot be read in this way
        if type(value.data) is Tensor and value.device.type != "meta" and value.numel():
            number = value.detach()[tuple(size // 2 for size in value.shape)]
            numbers.setdefault(value.device, []).append(number.float())
    digest = hashlib.sha256()
    for some in numbers.values():
        digest.update(torch.stack(some).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _content(intervention: Any) -> str:
    """A fingerprint of the tensors that an intervention holds, which its description leaves out."""
    digest = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // NUMBERS)]
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update((some.float() if some.is_floating_point() else some).cpu().numpy().tobytes())
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
