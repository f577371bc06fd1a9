"""Junctions: the torch hooks that carry hook points, put on a module only while one of its points is in use."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hooked_mllm.hooks.point import HookPoint

Kind = Literal["pre", "post"]


@dataclass
class Call:
    """One call of a module, as its torch hook sees it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    touched: bool = False
    #: scratch space of the points on this call
    state: dict[str, Any] = field(default_factory=dict)

    def first(self) -> Tensor:
        """The first argument, however it was passed."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def set_first(self, value: Any) -> None:
        """Replace the first argument."""
        if self.args:
            self.args = (value, *self.args[1:])
        else:
            self.kwargs = {**self.kwargs, "hidden_states": value}
        self.touched = True

    def main(self) -> Any:
        """The output, or the first of several."""
        return self.output[0] if isinstance(self.output, tuple) else self.output

    def set_main(self, value: Any) -> None:
        """Replace the output, or the first of several."""
        self.output = (value, *self.output[1:]) if isinstance(self.output, tuple) else value
        self.touched = True


@dataclass
class Binding:
    """How a point's activation is taken from a call, and how an edited one is put back."""

    point: HookPoint
    get: Callable[[Call], Tensor | None]
    put: Callable[[Call, Tensor], None]


@dataclass
class Junction:
    """All points that live on one side of one module, run in the order in which they were bound.

    Points are hung before any other hook of the module: transformers records hidden states with forward hooks of its
    own, and an edit must be what they see.
    """

    module: nn.Module
    kind: Kind
    bindings: list[Binding] = field(default_factory=list)
    #: called first at every call, for what a later junction needs to know; see `watch`
    watchers: list[tuple[Callable[[Call], None], list[HookPoint]]] = field(default_factory=list)
    handle: RemovableHandle | None = None

    def bind(self, point: HookPoint, get: Callable[[Call], Tensor | None], put: Callable[[Call, Tensor], None]) -> None:
        """Give a point its place here."""
        self.bindings.append(Binding(point, get, put))

    def watch(self, fn: Callable[[Call], None], points: list[HookPoint]) -> None:
        """Call `fn` at every call of the module while one of `points` is in use."""
        self.watchers.append((fn, points))

    def refresh(self) -> None:
        """Put the torch hook on or take it off, as the points need it."""
        needed = any(b.point.active for b in self.bindings) or any(p.active for _, ps in self.watchers for p in ps)
        if needed and self.handle is None:
            if self.kind == "pre":
                self.handle = self.module.register_forward_pre_hook(self._pre, prepend=True, with_kwargs=True)
            else:
                self.handle = self.module.register_forward_hook(self._post, prepend=True, with_kwargs=True)
        elif not needed:
            self.detach()

    def detach(self) -> None:
        """Take the torch hook off."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def _run(self, call: Call) -> None:
        for fn, points in self.watchers:
            if any(p.active for p in points):
                fn(call)
        for binding in self.bindings:
            if not binding.point.active:
                continue
            value = binding.get(call)
            if value is None:
                continue
            value, edited = binding.point.run(value)
            if edited:
                binding.put(call, value)

    def _pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call(module, args, kwargs)
        self._run(call)
        return (call.args, call.kwargs) if call.touched else None

    def _post(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = Call(module, args, kwargs, output)
        self._run(call)
        return call.output if call.touched else None
