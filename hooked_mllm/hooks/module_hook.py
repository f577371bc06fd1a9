"""ModuleHook: the torch hook on one side of a module, registered only while one of its hook points is in use."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hooked_mllm.hooks.point import HookPoint

#: "pre" is the input side of a module, "post" its output side
Kind = Literal["pre", "post"]


@dataclass
class Call:
    """One call of a module, as its torch hook receives it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    touched: bool = False
    #: values that the points of this call share
    state: dict[str, Tensor] = field(default_factory=dict)

    def first(self) -> Tensor:
        """The first argument, positional or by keyword."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def set_first(self, value: Any) -> None:
        """Replace the first argument."""
        if not self.args:
            self.set_argument("hidden_states", value)
            return
        self.args = (value, *self.args[1:])
        self.touched = True

    def set_argument(self, name: str, value: Any) -> None:
        """Replace a keyword argument."""
        self.kwargs = {**self.kwargs, name: value}
        self.touched = True

    def main(self) -> Any:
        """The output, or the first of several."""
        return self.output[0] if isinstance(self.output, tuple) else self.output

    def set_main(self, value: Any) -> None:
        """Replace the output, or the first of several."""
        self.output = (value, *self.output[1:]) if isinstance(self.output, tuple) else value
        self.touched = True


#: reads an activation from a call; None where the call has none
Getter = Callable[[Call], Tensor | None]
#: writes an edited activation into a call
Setter = Callable[[Call, Tensor], None]


@dataclass
class Binding:
    """A hook point, and how its activation is read from a call and written into it."""

    point: HookPoint
    get: Getter
    put: Setter


@dataclass
class ModuleHook:
    """The hook points on one side of one module; they run in the order in which they were bound.

    Its torch hook runs before all others of the module: transformers records hidden states with forward hooks, which
    must see edits.

    Examples:
        >>> import torch
        >>> from hooked_mllm.hooks import Call, HookPoint
        >>> module = torch.nn.Identity()
        >>> module_hook = ModuleHook(module, "post")
        >>> point = HookPoint("out", tower="text", block=None, on_change=lambda _: module_hook.refresh())
        >>> module_hook.bind(point, Call.main, Call.set_main)
        >>> handle = point.add_hook(lambda x, hook: x + 1)
        >>> module(torch.zeros(2))
        tensor([1., 1.])
    """

    module: nn.Module
    kind: Kind
    bindings: list[Binding] = field(default_factory=list)
    #: functions called at the start of every call, each with the points that need it; see `watch`
    watchers: list[tuple[Callable[[Call], None], list[HookPoint]]] = field(default_factory=list)
    handle: RemovableHandle | None = None

    def bind(self, point: HookPoint, get: Getter, put: Setter) -> None:
        """Add a point to this side of the module."""
        self.bindings.append(Binding(point, get, put))

    def watch(self, fn: Callable[[Call], None], points: list[HookPoint]) -> None:
        """Call `fn`, once and first, at every call of the module while one of `points` is in use."""
        for watcher, watcher_points in self.watchers:
            if watcher == fn:
                watcher_points.extend(points)
                return
        self.watchers.append((fn, list(points)))

    @property
    def points(self) -> list[HookPoint]:
        """All points that need this hook."""
        return [*(b.point for b in self.bindings), *(p for _, points in self.watchers for p in points)]

    def refresh(self) -> None:
        """Register the torch hook if a point is in use, remove it otherwise."""
        needed = any(point.registered for point in self.points)
        if needed and self.handle is None:
            if self.kind == "pre":
                self.handle = self.module.register_forward_pre_hook(self._pre, prepend=True, with_kwargs=True)
            else:
                self.handle = self.module.register_forward_hook(self._post, prepend=True, with_kwargs=True)
        elif not needed:
            self.detach()

    def detach(self) -> None:
        """Remove the torch hook."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def _run(self, call: Call) -> None:
        for fn, points in self.watchers:
            if any(p.active for p in points):
                fn(call)
        for binding in self.bindings:
            value = binding.get(call) if binding.point.active else None
            if value is not None:
                value, edited = binding.point.run(value)
                if edited:
                    binding.put(call, value)

    def _pre(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        call = Call(module, args, kwargs)
        self._run(call)
        return (call.args, call.kwargs) if call.touched else None

    def _post(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = Call(module, args, kwargs, output)
        self._run(call)
        return call.output if call.touched else None
