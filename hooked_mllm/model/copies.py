"""Copies of a HookedMLLM, which have hook points of their own; pickles are rejected."""

import copy
from typing import Any, NoReturn, TypeVar, cast

from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookValueError
from hooked_mllm.families.base import Family
from hooked_mllm.hooks.registry import HookRegistry
from hooked_mllm.model.direct_calls import DirectCalls
from hooked_mllm.wiring import Wiring, wire

#: attributes that are made on first use, and that a copy makes again
_CACHED = ("hook_dict", "_preparer", "nnsight")

# not `typing.Self`, which beartype rejects in methods of classes that it does not decorate
Copied = TypeVar("Copied", bound="Copies")


class Copies:
    """`copy.copy` and `copy.deepcopy`; a part of `HookedMLLM`."""

    hf_model: Any
    family: Family
    wiring: Wiring
    registry: HookRegistry

    def __copy__(self: Copied) -> Copied:
        other = object.__new__(type(self))
        other.__dict__ |= {name: value for name, value in vars(self).items() if name not in _CACHED}
        return other

    def __deepcopy__(self: Copied, memo: dict[int, Any]) -> Copied:
        if self.wiring.has_hooks:
            raise HookValueError(
                "A model with active hooks, interventions or attention is not copied: copy it outside of their `with`, "
                "after `reset_hooks(including_permanent=True)`."
            )
        memo[id(self.family)] = self.family
        memo[id(self)] = other = copy.copy(self)
        own = {name: value for name, value in vars(other).items() if name not in ("wiring", "registry")}
        other.__dict__ |= {name: copy.deepcopy(value, memo) for name, value in own.items()}
        other.wiring = wire(other.hf_model, other.family)
        other.registry = other.wiring.registry
        DirectCalls(cast(Model, other))
        for tower, switch in self.wiring.switches.items():
            for backend in switch.lasting:
                other.wiring.switches[tower].choose(None, copy.deepcopy(backend, memo))
        return other

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise HookValueError(
            "A HookedMLLM is not pickled, as its hooks are functions. Write it with hf_model.save_pretrained(folder) "
            "and processor.save_pretrained(folder), and load it with HookedMLLM.from_pretrained(folder)."
        )
