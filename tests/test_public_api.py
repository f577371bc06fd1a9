"""Every name of tests/data/public_api.json is still there, and every call that was right for it still is."""

import json
import re

import pytest

from helpers import public_api

LISTED = json.loads(public_api.LIST.read_text(encoding="utf-8"))


def changes(listed, today):
    return list(public_api.signature_changes(listed, today))


def test_the_list_is_of_the_whole_package():
    assert len(LISTED) >= 243
    assert {"hooked_mllm.HookedMLLM", "hooked_mllm.metrics.VisionMass", "hooked_mllm.toys.path"} <= LISTED.keys()
    assert len(LISTED["hooked_mllm.HookedMLLM"]) > 30
    assert "0x" not in public_api.LIST.read_text(encoding="utf-8"), "an address differs in each process"


#: parameters of internal constructors that have another name than in the list, and why
RENAMED = {
    "hooked_mllm.HookPoint.__init__": (
        "clock",
        "context",
        "the registry makes hook points, and gives them the context of its runs in the place of a count of calls",
    ),
    "hooked_mllm.wiring.Wiring.__init__": (
        "bystanders",
        "unhooked",
        "`wire` makes it by keyword; the attribute has the name of what it contains",
    ),
}


def listed_today(path):
    """What the list has of a name, with the parameters of `RENAMED` under their names of today."""
    listed, (old, new, _) = LISTED[path], RENAMED.get(f"{path}.__init__", ("", "", ""))
    if not old:
        return listed
    constructor = [re.sub(rf"^{old}\b", new, parameter) for parameter in listed["__init__"]]
    assert constructor != listed["__init__"], f"{path} has no parameter {old} in the list"
    return listed | {"__init__": constructor}


@pytest.mark.parametrize("path", LISTED)
def test_listed_names_are_unchanged(path):
    assert not public_api.breaches(path, listed_today(path))


def test_renamed_parameters_are_those_that_differ():
    differing = [path for path in LISTED if public_api.breaches(path, LISTED[path])]
    assert {f"{path}.__init__" for path in differing} == RENAMED.keys()
    assert all(reason for _, _, reason in RENAMED.values())


def test_exported_names_are_listed():
    unlisted = public_api.objects().keys() - LISTED.keys()
    assert not unlisted, f"run `PYTHONPATH=tests python -m helpers.public_api`: {', '.join(sorted(unlisted))}"


def test_options_may_become_parameters():
    assert not changes(["self", "**options"], ["self", "*", "title=None", "cmap=None"])
    assert changes(["self", "**options"], ["self"]) == ["parameter options is gone"]


def test_new_optional_parameters_break_no_call():
    assert not changes(["a", "b=1", "*", "c"], ["a", "b=1", "new=None", "*", "c", "extra=2", "**kwargs"])


@pytest.mark.parametrize(
    ("listed", "today", "change"),
    [
        (["a", "b=1"], ["a"], "parameter b is gone"),
        (["a", "b=1"], ["a", "b=2"], "parameter b was positional-or-keyword with default 1, is .* with default 2"),
        (["a", "b=1"], ["a", "b"], "parameter b was .*, is positional-or-keyword without default"),
        (["a", "b=1"], ["a", "*", "b=1"], "parameter b was positional-or-keyword .*, is keyword-only"),
        (["a", "/"], ["a"], "parameter a was positional-only .*, is positional-or-keyword"),
        (["a"], ["a", "*", "b"], "new parameter b has no default"),
        (["a", "b"], ["b", "a"], "positional parameters were a, b; they are b, a"),
        (["a=1", "c=1"], ["a=1", "b=1", "c=1"], "positional parameters were a, c; they are a, b, c"),
        (["*args", "**kwargs"], ["**kwargs"], "parameter args is gone"),
    ],
)
def test_changes_that_break_a_call_are_found(listed, today, change):
    (message,) = changes(listed, today)
    assert re.match(change, message), message


def test_written_signatures_keep_every_kind():
    def function(a, /, b, c=1, *args, d, e="x, y=1", **kwargs): ...

    written = public_api.parameters(function)
    assert written == ["a", "/", "b", "c=1", "*args", "d", "e='x, y=1'", "**kwargs"]
    assert public_api.read(written) == [
        ("a", "POSITIONAL_ONLY", None),
        ("b", "POSITIONAL_OR_KEYWORD", None),
        ("c", "POSITIONAL_OR_KEYWORD", "1"),
        ("args", "VAR_POSITIONAL", None),
        ("d", "KEYWORD_ONLY", None),
        ("e", "KEYWORD_ONLY", "'x, y=1'"),
        ("kwargs", "VAR_KEYWORD", None),
    ]


def test_members_and_names_that_are_gone_are_found():
    assert public_api.breaches("hooked_mllm.NoSuchName", "value") == ["hooked_mllm.NoSuchName is gone"]
    assert public_api.breaches("hooked_mllm.Box", "= hooked_mllm.Mask") == [
        "hooked_mllm.Box is no longer hooked_mllm.Mask"
    ]
    box = {"__init__": ["x0", "y0", "x1", "y1"], "area": ["self"], "image": ["self"]}
    assert public_api.breaches("hooked_mllm.Box", box) == [
        "hooked_mllm.Box.area is gone",
        "hooked_mllm.Box.image was ['self'], is attribute",
    ]


def test_members_of_other_packages_are_left_out():
    members = public_api.described(public_api.resolve("hooked_mllm.metrics.VisionMass"))
    assert {"update", "compute"} & members.keys() and "add_state" not in members and "forward" not in members
