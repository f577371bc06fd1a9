"""DeepStack: the visual features that Qwen3-VL adds after its first decoder blocks, outside of any module."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_mllm.errors import HookValueError
from hooked_mllm.families.base import Family
from hooked_mllm.hooks.module_hook import Call
from hooked_mllm.hooks.table import Side
from hooked_mllm.wiring.access import Access, Watcher

Features = Float[Tensor, "visual d_model"]


@dataclass(eq=False)
class DeepStack:
    """The features of the active run, and the mask of visual positions.

    The list of features is an argument of the language model and is read after each block: a hook point replaces its
    entry just before.
    """

    family: Family
    #: of the calls in progress; several where a hook runs the model inside of a run
    calls: list[tuple[list[Features] | None, Bool[Tensor, "batch pos"] | None]] = field(default_factory=list)

    @property
    def features(self) -> list[Features] | None:
        """The features of the innermost call; None without images."""
        return self.calls[-1][0] if self.calls else None

    @property
    def mask(self) -> Bool[Tensor, "batch pos"] | None:
        """The visual positions of the innermost call."""
        return self.calls[-1][1] if self.calls else None

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Hide the features of calls outside of the body of a `with`, and of calls that raised."""
        before, self.calls = self.calls, []
        try:
            yield
        finally:
            self.calls = before

    @contextmanager
    def holding(self, features: list[Features], mask: Bool[Tensor, "batch pos"] | None) -> Iterator[list[Features]]:
        """Provide features to blocks that run by themselves; hooks replace entries of the list, one tensor a block."""
        self.calls.append((features or None, mask))
        try:
            yield features
        finally:
            self.calls.pop()

    def enter(self, call: Call) -> None:
        """Take the features from a call of the language model."""
        features, mask = self.family.deepstack_of(call.kwargs)
        self.calls.append((features or None, mask))
        if self.features is not None and self.family.deepstack_arguments is not None:
            call.set_argument(self.family.deepstack_arguments[0], self.features)  # a list of which entries are replaced

    def leave(self, call: Call) -> None:
        """Drop the features after the call."""
        if self.calls:
            self.calls.pop()


@dataclass(frozen=True)
class DeepStackFeatures(Access):
    """`hook_deepstack` of one block: the features at visual positions, zero elsewhere."""

    deepstack: DeepStack
    path: str
    layer: int
    side: Side = "output"

    def watchers(self) -> list[Watcher]:
        language_model = self.deepstack.family.language_model
        return [(language_model, "input", self.deepstack.enter), (language_model, "output", self.deepstack.leave)]

    def get(self, call: Call) -> Float[Tensor, "batch pos d_model"] | None:
        features, mask = self.deepstack.features, self.deepstack.mask
        if features is None or mask is None or self.layer >= len(features):
            return None  # a step without images
        hidden = call.main()
        dense = torch.zeros_like(hidden)  # [batch pos d_model]
        dense[mask.to(hidden.device)] = features[self.layer].to(hidden.device, hidden.dtype)
        return dense

    def put(self, call: Call, value: Float[Tensor, "batch pos d_model"]) -> None:
        features, mask = self.deepstack.features, self.deepstack.mask
        assert features is not None and mask is not None  # `get` returned a value
        mask = mask.to(value.device)
        if bool((value[~mask] != 0).any()):
            raise HookValueError(
                f"A hook on blocks.{self.layer}.hook_deepstack wrote to positions that hold no visual token. DeepStack "
                f"adds to visual positions only: edit blocks.{self.layer}.hook_resid_post or "
                f"blocks.{self.layer + 1}.hook_resid_pre for others."
            )
        features[self.layer] = value[mask]  # [visual d_model]
