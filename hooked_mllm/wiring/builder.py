"""Makes hook points and the junctions that carry them, and keeps the two in step."""

from collections.abc import Callable

from torch import nn

from hooked_mllm.hooks.module_hook import Kind
from hooked_mllm.hooks.module_hook import ModuleHook as Junction
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.registry import HookRegistry


class Builder:
    """Where the wiring of a model is put together.

    Args:
        registry: Takes every point that is made.
    """

    def __init__(self, registry: HookRegistry) -> None:
        self.registry = registry
        self.junctions: dict[tuple[int, Kind], Junction] = {}
        self._listeners: dict[str, list[Callable[[], None]]] = {}

    def point(self, name: str, *, tower: str, block: int | None = None) -> HookPoint:
        """A new point, known to the registry."""
        return self.registry.add(
            HookPoint(name, tower=tower, block=block, clock=self.registry.clock, on_change=self._changed)
        )

    def junction(self, module: nn.Module, kind: Kind) -> Junction:
        """The junction on one side of a module, made on first use."""
        key = (id(module), kind)
        if key not in self.junctions:
            self.junctions[key] = Junction(module, kind)
        return self.junctions[key]

    def on_change(self, point: HookPoint, listener: Callable[[], None]) -> None:
        """Call `listener` whenever a hook is hung on `point` or taken off."""
        self._listeners.setdefault(point.name, []).append(listener)

    def finish(self) -> None:
        """Tell every junction which points it must follow."""
        for junction in self.junctions.values():
            for point in (*(b.point for b in junction.bindings), *(p for _, ps in junction.watchers for p in ps)):
                self.on_change(point, junction.refresh)

    def _changed(self, point: HookPoint) -> None:
        for listener in self._listeners.get(point.name, ()):
            listener()
