"""Writing files: whole or not at all, by any number of threads and processes, and with errors that state what to do."""

import errno
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, overload

from safetensors import SafetensorError

from hooked_mllm.errors import CacheFileError, InputError

#: age at which temporary files are removed, whatever process wrote them
_STALE_SECONDS = 24 * 3600
_ADVICE = {
    errno.ENOSPC: "the disk is full; free space, or write to another disk",
    errno.EDQUOT: "the disk quota is used up; free space, or write to another disk",
    errno.EFBIG: "the file is larger than the system allows; raise the limit, or write to another disk",
    errno.EROFS: "the file system is read-only; write to another folder",
    errno.EACCES: "permission is denied; change the permissions of its folder, or write to another one",
    errno.EPERM: "the operation is not permitted there; write to another folder",
    errno.ENOTDIR: "a part of the path is a file and not a folder; write to another folder",
    errno.EEXIST: "a part of the path is a file and not a folder; write to another folder",
    errno.EISDIR: "it is a folder; specify a file in it",
    errno.ENAMETOOLONG: "the name is too long; specify a shorter one",
}


@overload
def ready(path: None) -> None: ...
@overload
def ready(path: str | os.PathLike[str]) -> Path: ...
def ready(path: object) -> Path | None:
    """Make the folder of a file, check that the file can be written, and remove what killed processes left of it.

    None is returned as it is.

    Raises:
        CacheFileError: If the path is a folder, or its folder cannot be made or written to.
        InputError: If `path` is no path.
    """
    if path is None:
        return None
    path = as_path(path)
    with _reported(path):
        _make_folder(path)
        _remove_stale(path)
        with _temporary(path):
            return path


def ready_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and check that files can be written in it.

    Raises:
        CacheFileError: If the folder cannot be made or written to.
    """
    folder = as_path(path)
    with _reported(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _temporary(folder / "file"):
            return folder


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`.

    The temporary file has the name of `path`, in a private folder next to it, ".NAME.MACHINE.PID.TOKEN.tmp". A folder
    that a killed process left is removed by the next write to `path`, or after a day.

    Args:
        path: The file; its folder is made.
        write: Writes the content to the path that it is called with.

    Raises:
        CacheFileError: If the file cannot be written; a file that was there before is unchanged.
    """
    path = as_path(path)
    with _reported(path):
        _make_folder(path)
        _remove_stale(path)
        with _temporary(path) as temporary:
            permissions = stat.S_IMODE(temporary.stat().st_mode)
            write(temporary)
            if stat.S_IMODE(temporary.stat().st_mode) != permissions:  # safetensors makes a file of its own, 0600
                temporary.chmod(permissions)
            os.replace(temporary, path)  # noqa: PTH105


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text as UTF-8; what UTF-8 cannot hold, such as an undecodable byte of a file name, as an escape."""
    data = text.encode("utf-8", errors="backslashreplace")
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_figure(path: str | os.PathLike[str], figure: Any, **options: Any) -> None:
    """Write a matplotlib Figure as PNG; `options` are those of `Figure.savefig`."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, **{"format": "png", "dpi": 120, **options}))


def as_path(path: object) -> Path:
    """`path` as a `Path`; an `InputError` if it is none."""
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise InputError(f"Expected the path of a file, a str or pathlib.Path; got {path!r}.")
    return Path(path)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Report errors of the operating system in writing `path` as a `CacheFileError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        text, code = str(error), getattr(error, "errno", None)
        if code is None and (number := re.search(r"os error (\d+)", text)):  # as Rust words it
            code = int(number[1])
        raise CacheFileError(f"{path} cannot be written: {_ADVICE.get(code or 0, text)}.") from error


def _make_folder(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        what = "a folder; specify a file in it" if path.is_dir() else "a device or pipe; specify a file"
        raise CacheFileError(f"{path} cannot be written: it is {what}.")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """An empty file with the permissions of the umask, in a private folder next to `path`; both are removed."""
    folder = path.with_name(f".{path.name[:40]}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir(mode=0o700)
        (folder / path.name).touch()
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(path: Path) -> None:
    """Remove temporary folders of `path` that killed processes left."""
    pattern = re.compile(re.escape(f".{path.name[:40]}.") + r"([0-9a-f]{8})\.(\d+)\.[0-9a-f]{8}\.tmp")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            match = pattern.fullmatch(entry.name)
            if match and (
                (match[1] == _machine() and not _is_running(int(match[2])))
                or time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE_SECONDS
            ):
                shutil.rmtree(entry.path, ignore_errors=True)


@functools.cache
def _machine() -> str:
    """A short name of what process numbers belong to: the host, and on Linux the namespace of the container."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    if os.name != "posix":  # elsewhere, signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # a process of another user
        return True
    return True
