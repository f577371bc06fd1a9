"""Names of a package that are imported when they are first used (PEP 562), so that the package itself loads fast."""

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import beartype  # noqa: F401  # with the package, not on first use: after nnsight, beartype 0.23 cannot be imported


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
