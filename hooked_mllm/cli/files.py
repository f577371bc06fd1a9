"""Where the command line writes, and what it shows meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from hooked_mllm.errors import CacheFileError, InputError
from hooked_mllm.storage import ready_folder


def folder(path: Path) -> Path:
    """The folder for results, made where it does not exist, and checked before anything is measured."""
    try:
        return ready_folder(path)
    except CacheFileError as error:
        raise InputError(f"--out: {error}") from error


@contextmanager
def loading_bar(shown: bool) -> Iterator[None]:
    """Hide the bar of transformers in the body of a `with` statement, unless it is shown."""
    hide = not shown and is_progress_bar_enabled()
    if hide:
        disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            enable_progress_bar()
