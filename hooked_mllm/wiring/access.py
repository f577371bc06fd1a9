"""Access: where and how the activation of a hook point is read from a call of a module and written into it."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxtyping import Shaped
from torch import Tensor

from hooked_mllm.hooks.module_hook import Call
from hooked_mllm.hooks.table import Side

#: path of a module, its side, and a function to call there before the hook point is read
Watcher = tuple[str, Side, Callable[[Call], None]]


class Access(ABC):
    """How the activation of one hook point is read and written, at one side of the module at `path`."""

    path: str
    side: Side
    #: whether `get` returns memory that the model continues from, and no copy
    live = False

    @abstractmethod
    def get(self, call: Call) -> Tensor | None:
        """The activation; None if this call has none."""

    @abstractmethod
    def put(self, call: Call, value: Tensor) -> None:
        """Replace the activation by `value`, of its shape."""

    def watchers(self) -> list[Watcher]:
        """What must be recorded at other modules before the activation can be read."""
        return []


def add_batch_axis(x: Shaped[Tensor, "..."], packed: bool) -> Shaped[Tensor, "batch pos ..."]:
    """`[pos ...]` of a packed tower as `[1 pos ...]`; other tensors as they are."""
    return x[None] if packed else x


def remove_batch_axis(x: Shaped[Tensor, "batch pos ..."], packed: bool) -> Shaped[Tensor, "..."]:
    """The inverse of `add_batch_axis`."""
    return x[0] if packed else x
