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
def loading_bar(wanted: bool) -> Iterator[None]:
    """Within it, transformers' own bar only if it is wanted."""
    hide = not wanted and is_progress_bar_enabled()
    if hide:
        disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            enable_progress_bar()
