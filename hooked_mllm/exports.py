"""Names of a package that are imported when they are first used (PEP 562), so that the package itself loads fast."""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def lazy_exports(
    package: str, sources: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names load on first use.

    `sources` are names, separated by spaces, by module relative to `package` ("" for its sub-packages). The package
    repeats them in an `if TYPE_CHECKING` block, for type checkers, editors and the manual.
    """
    module_of = {name: f"{package}.{module}".rstrip(".") for module, names in sources.items() for name in names.split()}

    def lazy_getattr(name: str) -> Any:
        module, exporter = module_of.get(name, package), sys.modules[package]
        with _collector_paused():
            if module != package:
                value = getattr(import_module(module), name)
            elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
                value = import_module(f"{package}.{name}")
            else:
                raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=exporter)
        setattr(exporter, name, value)  # later uses find it without a call
        return value

    def lazy_dir() -> list[str]:
        loaded = vars(sys.modules[package]).items()
        shown = [name for name, value in loaded if name.startswith("__") or isinstance(value, ModuleType)]
        return sorted({*shown, *module_of})

    return lazy_getattr, lazy_dir, sorted(module_of)


#: modules of names that stay importable from a package that must not import them: {package: {name: module}}
MOVED: dict[str, dict[str, str]] = {}


def moved_name(package: str, name: str) -> Any:
    """A name that `MOVED` has for a package; an `AttributeError` for another one."""
    module = MOVED.get(package, {}).get(name)
    if module is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
    return getattr(import_module(module), name)


#: modules that moved, by their earlier address in the package, which stays an alias of the module
MOVED_MODULES = {
    "attending": "model.attention_methods",
    "attention.context": "measuring.view_context",
    "attention.engine": "attention.site",
    "attention.protocol": "contracts",
    "attention.routing.pooling": "attention.routing.lost_attention",
    "attention.rows": "measuring.attention_rows",
    "attention.selection": "measuring.query_selection",
    "attention.statistics": "attention.row_statistics",
    "attention.view": "measuring.attention_view",
    "config": "families.config",
    "corruptions.noise": "corruptions.region",
    "decode": "inputs.video_decoder",
    "heads.files": "storage.files",
    "hooking": "model.hook_methods",
    "hooks.junction": "hooks.module_hook",
    "images": "inputs.images",
    "kernels.hybrid_attention.encodings": "kernels.hybrid_attention.mask_types",
    "layout.find": "layout.items",
    "layout.pixels": "layout.shares",
    "layout.vision": "families.vision_layout",
    "loading": "model.loading",
    "measure": "measuring.measure",
    "measure_checkpoint": "measuring.checkpoint",
    "metrics.functional.checked": "checks.shapes",
    "nnsight_bridge": "model.nnsight_bridge",
    "objectives.rows": "objectives.logits",
    "prepare": "inputs.preparer",
    "prompt": "inputs.prompt",
    "run_methods": "model.run_methods",
    "running": "model.running",
    "sample": "inputs.sample",
    "shared_prefix": "measuring.shared_prefix",
    "toys.configs": "toys.build",
    "video": "inputs.video",
    "vision_positions": "model.vision_methods",
    "wiring.blocks": "wiring.model",
}


class _MovedModules(MetaPathFinder, Loader):
    """Imports a module of `MOVED_MODULES` by its earlier address."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, module = fullname.partition(".")
        moved = package == __package__ and module in MOVED_MODULES
        return ModuleSpec(fullname, self) if moved else None

    def exec_module(self, module: ModuleType) -> None:
        package, _, address = module.__name__.partition(".")
        sys.modules[module.__name__] = import_module(f"{package}.{MOVED_MODULES[address]}")


sys.meta_path.append(_MovedModules())


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: what an import makes stays, and passes over it are 15 % of the time that torch takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
