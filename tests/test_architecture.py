"""Rooms import only from lower floors, nothing imports itself in a circle, and the root stays free of loose files."""

from pathlib import Path

import pytest

from helpers import import_graph

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hooked_mllm"
LOOSE = {"errors.py", "version.py", "contracts.py", "exports.py", "__init__.py", "__main__.py"}


@pytest.fixture(scope="module")
def imports():
    return import_graph.imports(PACKAGE)


@pytest.fixture(scope="module")
def floors():
    return import_graph.floors((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


def test_rooms_import_only_from_lower_floors(imports, floors):
    assert len(imports) > 1000
    breaches = import_graph.upward(imports, floors)
    assert not breaches, "\n".join(breaches)


def test_no_rooms_import_one_another_in_a_circle(imports):
    circles = import_graph.circles(imports, rooms=True)
    assert not circles, "\n".join(circles)


def test_no_files_import_one_another_in_a_circle(imports):
    circles = import_graph.circles(imports)
    assert not circles, "\n".join(circles)


def test_no_loose_files_at_the_root():
    loose = {file.name for file in PACKAGE.glob("*.py")} - LOOSE
    assert not loose, f"each of these belongs into a room: {', '.join(sorted(loose))}"


def test_every_floor_is_of_rooms_that_exist(floors):
    rooms = {import_graph.room_of(module) for module in import_graph.modules(PACKAGE)}
    assert floors.keys() == rooms, "docs/architecture.md lists the rooms of the package"


# --- the reader itself, on a small package


MADE_UP = {
    "__init__.py": "from small.top import build as build\nfrom small.low import tables\n",
    "low/__init__.py": "",
    "low/tables.py": "import math\n\n\ndef late():\n    from small import top\n    return top\n",
    "middle/__init__.py": "",
    "middle/a.py": (
        "from typing import TYPE_CHECKING\n\nfrom small.low.tables import late\n\n"
        "if TYPE_CHECKING:\n    from small.top.build import House\nelse:\n    from . import b\n"
    ),
    "middle/b.py": "from .c import anything\n",
    "middle/c.py": "from importlib import import_module\n\nmodule = import_module('small.middle.a')\n",
    "top/__init__.py": "from small.top import build as build\n",
    "top/build.py": "import small.low.tables as tables\nimport small.loft\n\n\nclass House: ...\n",
    "loft.py": "from small.top.build import House\n",
}
MADE_UP_FLOORS = {"__init__": 4, "top": 3, "middle": 2, "low": 1}


@pytest.fixture
def small(tmp_path):
    for name, text in MADE_UP.items():
        file = tmp_path / "small" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return tmp_path / "small"


def test_every_form_of_import_is_read(small):
    read = {(i.importer, i.imported, i.line, i.kind) for i in import_graph.imports(small)}
    assert read == {
        ("small", "small.top.build", 1, ""),
        ("small", "small.low.tables", 2, ""),
        ("small.low.tables", "small.top", 5, "lazy"),
        ("small.middle.a", "small.low.tables", 3, ""),
        ("small.middle.a", "small.top.build", 6, "type-only"),
        ("small.middle.a", "small.middle.b", 8, ""),
        ("small.middle.b", "small.middle.c", 1, ""),
        ("small.middle.c", "small.middle.a", 3, ""),
        ("small.top", "small.top.build", 1, ""),
        ("small.top.build", "small.low.tables", 1, ""),
        ("small.top.build", "small.loft", 2, ""),
        ("small.loft", "small.top.build", 1, ""),
    }


def test_upward_imports_are_named_with_file_and_line(small):
    breaches = import_graph.upward(import_graph.imports(small), MADE_UP_FLOORS | {"loft": 3})
    assert breaches == [
        "small/loft.py:1: loft (floor 3) imports top (floor 3): small.top.build",
        "small/low/tables.py:5 (lazy): low (floor 1) imports top (floor 3): small.top",
        "small/middle/a.py:6 (type-only): middle (floor 2) imports top (floor 3): small.top.build",
        "small/top/build.py:2: top (floor 3) imports loft (floor 3): small.loft",
    ]
    assert "small/loft.py:1: loft is on no floor" in import_graph.upward(import_graph.imports(small), MADE_UP_FLOORS)


def test_circles_are_named_step_by_step(small):
    assert import_graph.circles(import_graph.imports(small)) == [
        "small/loft.py:1: small.loft imports small.top.build; small/top/build.py:2: small.top.build imports small.loft",
        "small/low/tables.py:5 (lazy): small.low.tables imports small.top; "
        "small/top/__init__.py:1: small.top imports small.top.build; "
        "small/top/build.py:1: small.top.build imports small.low.tables",
        "small/middle/a.py:8: small.middle.a imports small.middle.b; "
        "small/middle/b.py:1: small.middle.b imports small.middle.c; "
        "small/middle/c.py:3: small.middle.c imports small.middle.a",
    ]
    assert import_graph.circles(import_graph.imports(small), rooms=True) == [
        "small/loft.py:1: loft imports top; small/top/build.py:2: top imports loft",
        "small/low/tables.py:5 (lazy): low imports top; small/top/build.py:1: top imports low",
    ]


def test_a_package_in_order_has_no_breach(small):
    (small / "loft.py").unlink()
    (small / "top" / "build.py").write_text("from small.middle import a\nfrom small.low.tables import late\n")
    (small / "low" / "tables.py").write_text("import json\n")
    (small / "middle" / "a.py").write_text("from small.low import tables\n")
    read = import_graph.imports(small)
    assert len(read) == 8
    assert not import_graph.upward(read, MADE_UP_FLOORS)
    assert not import_graph.circles(read) and not import_graph.circles(read, rooms=True)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("# Rooms\n", "the page has 0"),
        ("```text\n 1  a, b\n```\n\n```text\n 2  c\n```\n", "the page has 2"),
        ("```text\n 2  a, b\n 1  b\n```\n", "b is on floors 2 and 1"),
    ],
)
def test_a_page_without_one_list_of_floors(page, message):
    with pytest.raises(ValueError, match=message):
        import_graph.floors(page)


def test_floors_are_read_from_a_page():
    page = "# Rooms\n\n```python\nx = 1\n```\n\n```text\n10  top\n 1  low, cellar\n```\n"
    assert import_graph.floors(page) == {"top": 10, "low": 1, "cellar": 1}
