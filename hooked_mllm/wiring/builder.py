"""Builder: makes hook points and the module hooks that serve them, and keeps the two in step."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from hooked_mllm.hooks.module_hook import Kind, ModuleHook
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.registry import HookRegistry
from hooked_mllm.hooks.table import PointSpec, Side, TowerName
from hooked_mllm.wiring.access import Access

KINDS: dict[Side, Kind] = {"input": "pre", "output": "post"}


@dataclass(eq=False)
class Builder:
    """Makes the hook points and module hooks of one model; `registry` receives the points."""

    model: nn.Module
    registry: HookRegistry
    module_hooks: dict[tuple[int, Kind], ModuleHook] = field(default_factory=dict)
    #: each module that has a hook, its parent, and its name there
    modules: dict[str, tuple[nn.Module, str, nn.Module]] = field(default_factory=dict)
    _listeners: dict[str, list[Callable[[], None]]] = field(default_factory=dict)

    def point(self, spec: PointSpec, tower: TowerName, layer: int | None = None) -> HookPoint:
        """Make a hook point for an entry of the table, and register it."""
        name, context = spec.name(tower, layer), self.registry.context
        return self.registry.add(HookPoint(name, tower=tower, block=layer, context=context, on_change=self._changed))

    def module_hook(self, path: str, side: Side) -> ModuleHook:
        """The module hook on one side of a module, made on first use."""
        module, kind = self.model.get_submodule(path), KINDS[side]
        parent_path, _, name = path.rpartition(".")
        parent = self.model.get_submodule(parent_path)
        self.modules[path] = getattr(parent, "_orig_mod", parent), name, module  # the module in a `torch.compile`d one
        return self.module_hooks.setdefault((id(module), kind), ModuleHook(module, kind))

    def bind(self, point: HookPoint, access: Access) -> None:
        """Let the module hook of an access run a point, and those of its watchers serve it."""
        point.live = access.live
        self.module_hook(access.path, access.side).bind(point, access.get, access.put)
        for path, side, fn in access.watchers():
            self.module_hook(path, side).watch(fn, [point])

    def on_change(self, point: HookPoint, listener: Callable[[], None]) -> None:
        """Call `listener` after every change of the hooks of `point`."""
        self._listeners.setdefault(point.name, []).append(listener)

    def finish(self) -> None:
        """Connect every module hook to its points, so that it is registered and removed as they need it."""
        for module_hook in self.module_hooks.values():
            for point in module_hook.points:
                self.on_change(point, module_hook.refresh)

    def _changed(self, point: HookPoint) -> None:
        for listener in self._listeners.get(point.name, ()):
            listener()
        self.registry.changed(point)
