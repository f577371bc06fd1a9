"""Attention backends, and how this package takes its place in transformers' attention interface.

For every implementation that transformers knows ("eager", "sdpa", ...) a twin is registered under `hooked_mllm_<name>`:
it runs the hooks and then the very same implementation on the very same mask. A tower is switched to its twin only
while something needs to be seen or edited there, and back afterwards.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable
from weakref import ReferenceType, WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hooked_mllm.attention.masks import MaskRows, with_recipe
from hooked_mllm.errors import UnsupportedModelError

PREFIX = "hooked_mllm_"
#: transformers hands a packed vision tower's images over in one call if the implementation's name holds this word
PACKED_SUFFIX = "_flash_packed"

#: what runs in place of an attention module's implementation, by module; weak, so that a dropped model is freed
SITES: "WeakKeyDictionary[nn.Module, ReferenceType[Callable[..., tuple[Tensor, Tensor | None]]]]" = WeakKeyDictionary()


@runtime_checkable
class AttentionBackend(Protocol):
    """A user's own attention: q, k, v after position encoding in, z out.

    Shapes: q `[batch head query d_head]`, k, v `[batch kv_head key d_head]`, z `[batch query head d_head]`.
    `mask.rows(index)` gives the rows of the model's mask.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskRows, scale: float, layer: int) -> Tensor:
        """The attention of one layer."""
        ...


def _dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    reference = SITES.get(module)
    site = None if reference is None else reference()
    if site is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} runs under a '{PREFIX}...' attention implementation without belonging to a "
            "HookedMLLM. Load the model with a transformers implementation such as 'sdpa' and wrap it with "
            "HookedMLLM.from_model."
        )
    return site(*args, **kwargs)


def _mask_twin(base: str) -> Callable[..., Any]:
    def mask(**arguments: Any) -> Any:
        return with_recipe(ALL_MASK_ATTENTION_FUNCTIONS[base](**arguments), **arguments)

    return mask


def twin(base: str, packed: bool = False) -> str:
    """The name of the hooked twin of an implementation, registered on first use.

    Args:
        base: A name of transformers' attention interface.
        packed: For a packed vision tower, which is then called once for all of its images.
    """
    name = PREFIX + base + (PACKED_SUFFIX if packed and "flash" not in base else "")
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _dispatch)
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, _mask_twin(base))
    return name


def is_known(base: str) -> bool:
    """Whether transformers has an attention implementation of that name."""
    return base == "eager" or base in ALL_ATTENTION_FUNCTIONS


def implementation(module: nn.Module, base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that `module` would call under `base`: for "eager", the one of its own modelling file."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)


#: switches that need the twin, by the identity of the configuration: several models may be built from one
_TAKEN: Counter[int] = Counter()


class TowerSwitch:
    """Switches one tower between its own attention implementation and the hooked twin of it, by need.

    Args:
        config: The tower's configuration, which all its layers share.
        packed: Whether the tower is packed.
    """

    def __init__(self, config: Any, packed: bool) -> None:
        self.config = config
        self.packed = packed
        self.users = 0

    def _set(self, base: str) -> None:
        self.config._attn_implementation = twin(base, self.packed) if _TAKEN[id(self.config)] else base

    @property
    def base(self) -> str:
        """The implementation that the model itself runs."""
        current = self.config._attn_implementation or "eager"
        return current.removeprefix(PREFIX).removesuffix(PACKED_SUFFIX) if current.startswith(PREFIX) else current

    def take(self) -> None:
        """One more user: switch on the twin with the first."""
        if self.users == 0:
            _TAKEN[id(self.config)] += 1
            self._set(self.base)
        self.users += 1

    def give_back(self) -> None:
        """One user less: restore the model's own implementation with the last."""
        self.users -= 1
        if self.users == 0:
            _TAKEN[id(self.config)] -= 1
            self._set(self.base)

    @contextmanager
    def using(self, base: str) -> Iterator[None]:
        """Within it, the tower runs another implementation, hooked if it is in use."""
        own = self.base
        try:
            self._set(base)
            yield
        finally:
            self._set(own)

    def release(self) -> None:
        """Let go for all users, whoever they were."""
        if self.users:
            self.users = 1
            self.give_back()
