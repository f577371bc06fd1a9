"""The errors of the package: each states what was expected, what came, and what to do."""

import difflib
from collections.abc import Iterable


class HookedMLLMError(Exception):
    """Base class of every error this package raises on purpose."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class HookNameError(HookedMLLMError, KeyError):
    """A hook or cache name that this model does not have."""


class HookValueError(HookedMLLMError, ValueError):
    """A hook returned, or was given, something that does not fit its place."""


class LayoutError(HookedMLLMError, ValueError):
    """A question about positions that the token layout cannot answer."""


class InputError(HookedMLLMError, ValueError):
    """Inputs that are missing, contradictory or damaged."""


class UnsupportedModelError(HookedMLLMError, ValueError):
    """A model or checkpoint that is not one of the supported families."""


class CacheFileError(HookedMLLMError, ValueError):
    """A file that cannot be written, or is not what it should be: damaged, pickled, or of another kind."""


class NumericsError(HookedMLLMError, ArithmeticError):
    """A NaN or an infinity where a number was due."""


class HeadError(HookedMLLMError, IndexError):
    """A layer or head that the model does not have."""


def nearest(name: str, choices: Iterable[str], n: int = 3) -> str:
    """The closest of `choices` to `name`, as text for an error message.

    Examples:
        >>> nearest("hook_patern", ["hook_pattern", "hook_z"])
        "Did you mean 'hook_pattern' or 'hook_z'?"
    """
    close = difflib.get_close_matches(name, list(choices), n=n, cutoff=0.4)
    if not close:
        return ""
    return "Did you mean " + " or ".join(repr(c) for c in close) + "?"
