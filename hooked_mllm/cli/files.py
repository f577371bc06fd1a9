"""Where the command line writes, and what it shows meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from hooked_mllm.errors import InputError
from hooked_mllm.storage import write_atomically


def folder(path: Path) -> Path:
    """The folder, made if need be; found out before the measuring and not after it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path} is not a folder that can be written to: {error.strerror}") from error
    return path


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))


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
