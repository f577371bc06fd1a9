"""The public names of the package with their signatures; `python -m helpers.public_api` adds new names to the list.

The list is tests/data/public_api.json, one name on a line. A function is the list of its parameters, written as in a
signature (`["values", "/", "k=1", "*", "seed=0"]`); a class holds its constructor and its public members; `"= name"` is
the same object under another name; anything else is "value" or "module".
"""

import ast
import enum
import importlib
import inspect
import json
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hooked_mllm

LIST = Path(__file__).parents[1] / "data" / "public_api.json"


def packages() -> list[str]:
    """`hooked_mllm` and every package in it."""
    modules = pkgutil.walk_packages(hooked_mllm.__path__, "hooked_mllm.")
    return ["hooked_mllm", *sorted(m.name for m in modules if m.ispkg)]


def exported(package: str) -> list[str]:
    """The names that a package's `__init__` exports: its imports of the form `X as X`, also in `if TYPE_CHECKING`."""
    tree = ast.parse(Path(importlib.import_module(package).__file__ or "").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)]
    return sorted({alias.asname for node in imports for alias in node.names if alias.asname})


def parameters(function: Any) -> list[str] | str:
    """The parameters as they are written in a signature, without annotations; "value" where there is no signature."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return "value"
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return _written(plain)


def _written(plain: list[inspect.Parameter]) -> list[str]:
    out, previous = [], None
    for parameter in plain:
        if previous is parameter.POSITIONAL_ONLY and parameter.kind is not parameter.POSITIONAL_ONLY:
            out.append("/")
        if parameter.kind is parameter.KEYWORD_ONLY and previous not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            out.append("*")
        out.append(str(parameter))
        previous = parameter.kind
    return [*out, "/"] if previous is inspect.Parameter.POSITIONAL_ONLY else out


def read(written: list[str]) -> list[tuple[str, str, str | None]]:
    """Name, kind and default of each parameter of a written signature."""
    out: list[tuple[str, str, str | None]] = []
    kind = "POSITIONAL_OR_KEYWORD"
    for text in written:
        name, equals, default = text.partition("=")
        if text == "/":
            out = [(n, "POSITIONAL_ONLY", d) for n, _, d in out]
        elif text.startswith("**"):
            out.append((text[2:], "VAR_KEYWORD", None))
        elif text.startswith("*"):
            kind = "KEYWORD_ONLY"
            out += [(text[1:], "VAR_POSITIONAL", None)] if len(text) > 1 else []
        else:
            out.append((name, kind, default if equals else None))
    return out


def described(thing: Any) -> Any:
    """What the list holds of one object."""
    if inspect.isclass(thing) and thing is not Any:  # what an alias is at run time
        members = {n: _member(inspect.getattr_static(thing, n)) for n in dir(thing) if _is_public(thing, n)}
        # the constructors of Protocols and enumerations are Python's own, and differ between its versions
        plain = getattr(thing, "_is_protocol", False) or issubclass(thing, enum.Enum)
        return members if plain else {"__init__": parameters(thing)} | members
    if typing.get_origin(thing) is not None or thing is Any:  # an alias of types
        return "value"
    if callable(thing):
        return parameters(thing)
    return "module" if inspect.ismodule(thing) else "value"


def _is_public(cls: type, name: str) -> bool:
    """Whether a member belongs to the interface; members of torchmetrics, torch and the standard library do not."""
    owner = next((c for c in cls.__mro__ if name in vars(c)), cls)
    return not name.startswith("_") and owner.__module__.startswith("hooked_mllm")


def _member(member: Any) -> list[str] | str:
    function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
    return parameters(function) if callable(function) else "attribute"


def objects() -> dict[str, Any]:
    """Every exported object by its dotted path, shorter paths before longer ones."""
    out = {f"{p}.{name}": getattr(importlib.import_module(p), name) for p in packages() for name in exported(p)}
    return dict(sorted(out.items(), key=lambda item: (item[0].count("."), item[0])))


def public_api() -> dict[str, Any]:
    """The whole interface by dotted path."""
    out: dict[str, Any] = {}
    paths: dict[int, str] = {}
    for path, thing in objects().items():
        repeated = (inspect.isclass(thing) or inspect.isfunction(thing)) and id(thing) in paths
        out[path] = f"= {paths[id(thing)]}" if repeated else described(thing)
        paths.setdefault(id(thing), path)
    return out


def resolve(path: str) -> Any:
    """The object at a dotted path, reached as a user does: by importing the package and reading its attribute.

    Raises:
        AttributeError: There is no such object.
    """
    package, _, name = path.rpartition(".")
    return getattr(importlib.import_module(package), name)


def breaches(path: str, listed: Any) -> list[str]:
    """What a user of a listed name would miss today, one sentence each; an empty list where all of it is there."""
    try:
        thing = resolve(path)
    except AttributeError:
        return [f"{path} is gone"]
    if isinstance(listed, str) and listed.startswith("= "):
        return [] if thing is resolve(listed[2:]) else [f"{path} is no longer {listed[2:]}"]
    return list(_changes(path, listed, described(thing)))


def _changes(path: str, listed: Any, today: Any) -> Iterator[str]:
    if isinstance(listed, list) and isinstance(today, list):
        yield from (f"{path}: {change}" for change in signature_changes(listed, today))
    elif isinstance(listed, dict) and isinstance(today, dict):
        for name, member in listed.items():
            if name in today:
                yield from _changes(f"{path}.{name}", member, today[name])
            else:
                yield f"{path}.{name} is gone"
    elif listed != today:
        yield f"{path} was {listed}, is {today}"


def signature_changes(listed: list[str], today: list[str]) -> Iterator[str]:
    """What breaks a call that was right for the listed signature; new optional parameters break none."""
    before, after = ({name: (kind, default) for name, kind, default in read(s)} for s in (listed, today))
    by_name = {name for name, (kind, _) in after.items() if kind == "KEYWORD_ONLY" and name not in before}
    for name, value in before.items():
        if name not in after:
            if value[0] != "VAR_KEYWORD" or not by_name:  # `**options` may become the options by name
                yield f"parameter {name} is gone"
        elif after[name] != value:
            yield f"parameter {name} was {_shown(value)}, is {_shown(after[name])}"
    for name, (kind, default) in after.items():
        if name not in before and default is None and not kind.startswith("VAR"):
            yield f"new parameter {name} has no default"
    old_order, order = (
        [n for n, (kind, _) in side.items() if kind.startswith("POSITIONAL")] for side in (before, after)
    )
    if set(old_order) <= set(order) and order[: len(old_order)] != old_order:
        yield f"positional parameters were {', '.join(old_order)}; they are {', '.join(order)}"


def _shown(parameter: tuple[str, str | None]) -> str:
    kind, default = parameter
    return f"{kind.lower().replace('_', '-')} {'without default' if default is None else f'with default {default}'}"


def text(api: dict[str, Any]) -> str:
    """The list as it is stored."""
    lines = [f"{json.dumps(path)}: {json.dumps(listed)}" for path, listed in api.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    LIST.write_text(text(public_api() | json.loads(LIST.read_text(encoding="utf-8"))), encoding="utf-8")
