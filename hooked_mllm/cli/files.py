"""Where the command line writes."""

from pathlib import Path
from typing import Any

from hooked_mllm.errors import InputError
from hooked_mllm.heads.files import write_atomically


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
