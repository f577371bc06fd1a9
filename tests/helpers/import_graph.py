"""The imports of a package, read from its syntax trees, and what is wrong with them: upward imports and circles."""

import ast
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FLOORS = re.compile(r"^```text\n((?: *\d+  .+\n)+)```", re.MULTILINE)


@dataclass(frozen=True)
class Import:
    """One module that one line of another imports; `kind` is "", "type-only" or "lazy"."""

    importer: str
    imported: str
    file: Path
    line: int
    kind: str

    def __str__(self) -> str:
        kind = f" ({self.kind})" if self.kind else ""
        return f"{self.file}:{self.line}{kind}"


def floors(page: str) -> dict[str, int]:
    """The floor of each room, from the one block of lines `number  room, room` on a page.

    Raises:
        ValueError: The page has no such block, or several, or names a room twice.
    """
    blocks = FLOORS.findall(page)
    if len(blocks) != 1:
        raise ValueError(f"expected one ```text block of lines `number  room, room`; the page has {len(blocks)}")
    out: dict[str, int] = {}
    for line in blocks[0].splitlines():
        number, names = line.split(maxsplit=1)
        for room in names.split(", "):
            if room in out:
                raise ValueError(f"{room} is on floors {out[room]} and {number}")
            out[room] = int(number)
    return out


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package in folder `root`, by dotted name."""
    out = {}
    for file in sorted(root.rglob("*.py")):
        parts = [root.name, *file.relative_to(root).with_suffix("").parts]
        out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return out


def imports(root: Path) -> list[Import]:
    """All imports between modules of a package, in functions and in `if TYPE_CHECKING` too."""
    known = modules(root)
    out = []
    for module, file in known.items():
        shown = file.relative_to(root.parent)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node, kind in _walk(tree, ""):
            for target in sorted(set(_targets(node, module, file, known)) - {module}):
                out.append(Import(module, target, shown, node.lineno, kind))
    return out


def _walk(node: ast.AST, kind: str) -> Iterator[tuple[ast.AST, str]]:
    """Every node with the kind that an import at its place has."""
    for child in ast.iter_child_nodes(node):
        inner = kind
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inner = kind or "lazy"
        elif isinstance(node, ast.If) and child in node.body and "TYPE_CHECKING" in ast.unparse(node.test):
            inner = "type-only"
        yield child, inner
        yield from _walk(child, inner)


def _targets(node: ast.AST, module: str, file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of the package that a statement or a call of `import_module` imports."""
    package = module.split(".")[0]
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        source = _source(node, module, file)
        names = [f"{source}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    else:
        return
    for name in names:
        while name not in known and "." in name:  # a class or function: its module
            name = name.rpartition(".")[0]
        if name.split(".")[0] == package:
            yield name


def _source(node: ast.ImportFrom, module: str, file: Path) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    above = node.level - (file.name == "__init__.py")
    return ".".join([*parts[: len(parts) - above], *([node.module] if node.module else [])])


def room_of(module: str) -> str:
    """The folder or file at the package root that holds a module; the root itself is `__init__`."""
    return [*module.split("."), "__init__"][1]


def upward(entries: Iterable[Import], floor_of: Mapping[str, int]) -> list[str]:
    """Imports of a room on the importer's own floor or above it, and rooms that are on no floor."""
    out = []
    for entry in entries:
        importer, imported = room_of(entry.importer), room_of(entry.imported)
        if importer == imported:
            continue
        missing = [room for room in (importer, imported) if room not in floor_of]
        if missing:
            out.append(f"{entry}: {missing[0]} is on no floor")
        elif floor_of[imported] >= floor_of[importer]:
            rooms = f"{importer} (floor {floor_of[importer]}) imports {imported} (floor {floor_of[imported]})"
            out.append(f"{entry}: {rooms}: {entry.imported}")
    return out


def circles(entries: Iterable[Import], rooms: bool = False) -> list[str]:
    """A shortest circle through each group of files (or rooms) that import one another, with file and line."""
    edges: dict[str, dict[str, Import]] = {}
    for entry in entries:
        ends = [room_of(m) if rooms else m for m in (entry.importer, entry.imported)]
        if ends[0] != ends[1]:
            edges.setdefault(ends[0], {}).setdefault(ends[1], entry)
    out, seen = [], set()
    for start in sorted(edges):
        if start not in seen and (circle := _back_to(start, edges)):
            seen.update(circle)
            steps = [f"{edges[a][b]}: {a} imports {b}" for a, b in zip(circle, [*circle[1:], start], strict=True)]
            out.append("; ".join(steps))
    return out


def _back_to(start: str, edges: Mapping[str, Mapping[str, Import]]) -> list[str]:
    """The nodes of a shortest path from `start` back to itself; empty if there is none."""
    paths, reached = deque([[start]]), {start}
    while paths:
        path = paths.popleft()
        for node in edges.get(path[-1], {}):
            if node == start:
                return path
            if node not in reached:
                reached.add(node)
                paths.append([*path, node])
    return []
