"""Errors are one family, print their message, and are caught as the built-in errors that they are."""

import pickle

import pytest

from hooked_mllm import errors
from hooked_mllm.errors import HookedMLLMError, HookNameError, nearest

KINDS = {
    "HookNameError": KeyError,
    "HookValueError": ValueError,
    "LayoutError": ValueError,
    "InputError": ValueError,
    "UnsupportedModelError": ValueError,
    "CacheFileError": ValueError,
    "NumericsError": ArithmeticError,
    "HeadError": IndexError,
}


@pytest.mark.parametrize("name", KINDS)
def test_each_error_is_ours_and_a_built_in_one(name):
    kind = getattr(errors, name)
    assert issubclass(kind, HookedMLLMError) and issubclass(kind, KINDS[name])
    assert str(kind("No hook 'a'.")) == "No hook 'a'.", "a KeyError would print the quoted message"
    assert str(kind()) == ""


def test_no_error_is_missing_here():
    ours = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, HookedMLLMError)}
    assert ours == {*KINDS, "HookedMLLMError"}


def test_errors_can_be_pickled():
    again = pickle.loads(pickle.dumps(HookNameError("No hook 'a'.")))
    assert type(again) is HookNameError and str(again) == "No hook 'a'."


@pytest.mark.parametrize(
    ("name", "choices", "text"),
    [
        ("hook_patern", ["hook_pattern", "hook_z"], "Did you mean 'hook_pattern' or 'hook_z'?"),
        ("questoin", ["question", "answer"], "Did you mean 'question'?"),
        ("xyz", ["question", "answer"], ""),
        ("a", [], ""),
    ],
)
def test_the_nearest_names(name, choices, text):
    assert nearest(name, choices) == text


def test_at_most_so_many_names():
    names = [f"blocks.{n}.hook_z" for n in range(9)]
    assert nearest("blocks.hook_z", names, n=2).count("blocks") == 2 and nearest("blocks.hook_z", iter(names))
