"""Writing: checked first, whole or not at all, under concurrent writers, and with errors that state what to do."""

import errno
import json
import os
import resource
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from matplotlib.figure import Figure

from hooked_mllm.errors import CacheFileError, InputError
from hooked_mllm.storage import (
    read_json,
    read_tensors,
    ready,
    ready_folder,
    write_atomically,
    write_figure,
    write_json,
    write_tensors,
    write_text,
)

WRITERS = {
    "text": lambda path: write_text(path, "text"),
    "json": lambda path: write_json(path, "demo", {"a": 1}),
    "tensors": lambda path: write_tensors(path, "demo", {"a": torch.ones(3)}, {}),
    "figure": lambda path: write_figure(path, Figure(figsize=(1, 1))),
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- checks before writing --------------------------------------------------------------------------------------------


def test_the_folder_is_made_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "deep" / "file.json"
    assert ready(str(path)) == path and ready(path) == path
    assert names(path.parent) == []
    assert ready_folder(tmp_path / "results") == tmp_path / "results" and names(tmp_path / "results") == []
    assert ready(None) is None


@pytest.mark.parametrize("write", [ready, *WRITERS.values()])
def test_paths_that_cannot_be_written(tmp_path, write):
    (tmp_path / "file").write_text("kept")
    for path, message in (
        (tmp_path, "is a folder; specify a file in it"),
        ("", "is a folder"),
        (tmp_path / "file" / "x", "a part of the path is a file and not a folder"),
        (tmp_path / "file" / "x" / "y", "a part of the path is a file and not a folder"),
        (tmp_path / ("x" * 300), "the name is too long"),
        ("/dev/null", "a device or pipe"),
    ):
        with pytest.raises(CacheFileError, match=message) as caught:
            write(path)
        assert str(Path(path)) in str(caught.value)
    with pytest.raises(InputError, match="Expected the path of a file"):
        write("a\0b")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_what_is_no_path():
    with pytest.raises(InputError, match=r"Expected the path of a file, a str or pathlib.Path; got 3\."):
        ready(3)
    with pytest.raises(CacheFileError, match="results cannot be written: a part of the path is a file"):
        ready_folder(Path(__file__) / "results")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EROFS, "the file system is read-only; write to another folder"),
        (errno.EACCES, "permission is denied; change the permissions"),
        (errno.ENOSPC, "the disk is full; free space"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch, code, message):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "mkdir", fail)
    for write in (ready, lambda path: ready_folder(path.parent), *WRITERS.values()):
        with pytest.raises(CacheFileError, match=f"cannot be written: .*{message}"):
            write(tmp_path / "file")
    monkeypatch.undo()
    assert names(tmp_path) == []


@pytest.fixture
def plain_user():
    """Not root, to whom every folder is writable."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    if user == 0:
        os.seteuid(0)


def test_a_read_only_folder(plain_user):
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o500)
        for write in (ready, lambda path: ready_folder(path.parent / "more"), *WRITERS.values()):
            with pytest.raises(CacheFileError, match="permission is denied; change the permissions of its folder"):
                write(Path(folder) / "file")
        Path(folder).chmod(0o700)
        WRITERS["text"](Path(folder) / "file")


# -- whole or not at all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("umask", "permissions"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, writer, umask, permissions):
    before = os.umask(umask)
    try:
        WRITERS[writer](tmp_path / "new" / "file")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "file").stat().st_mode) == permissions
    assert names(tmp_path / "new") == ["file"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError("disk full"), "cannot be written: disk full"),
        (KeyboardInterrupt(), None),
        (ValueError("the figure has a bad title"), None),
    ],
)
def test_an_interrupted_writer_leaves_the_old_file_and_nothing_else(tmp_path, error, message):
    path = tmp_path / "file"

    def half(temporary):
        assert temporary != path
        temporary.write_text("half")
        (temporary.parent / "its own temporary file").write_text("half")
        raise error

    for before in (None, "old"):
        if before is not None:
            path.write_text(before)
        with pytest.raises(CacheFileError if message else type(error), match=message):
            write_atomically(path, half)
        assert names(tmp_path) == ([] if before is None else ["file"])
    assert path.read_text() == "old"


@pytest.mark.parametrize("writer", WRITERS)
def test_a_rename_that_fails_leaves_the_old_file(tmp_path, monkeypatch, writer):
    (tmp_path / "file").write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CacheFileError, match="the disk is full"):
        WRITERS[writer](tmp_path / "file")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_file_that_the_system_cuts_off(tmp_path):
    """A limit on file sizes stops the writers of Python and of safetensors half-way, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CacheFileError, match="larger than the system allows"):
            write_text(tmp_path / "file", "x" * 100_000)
        with pytest.raises(CacheFileError, match="larger than the system allows"):
            write_tensors(tmp_path / "file", "demo", {"a": torch.ones(25_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_what_utf8_cannot_hold_is_an_escape(tmp_path):
    name = os.fsdecode(b"caf\xe9")  # a file name in Latin-1
    write_json(tmp_path / "file", "demo", {"model": name, "note": "größer"})
    assert read_json(tmp_path / "file", "demo") == {"kind": "demo", "model": name, "note": "größer"}
    assert "größer" in (tmp_path / "file").read_text(encoding="utf-8")


# -- several writers -------------------------------------------------------------------------------------------------

SAVES = 40
WORKER = """
import sys, threading, torch
from pathlib import Path
from hooked_mllm.storage import write_json, write_tensors

folder, number, saves, errors = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), []

def work(thread):
    value = float(10 * number + thread)
    try:
        for _ in range(saves):
            write_json(folder / "scores.json", "demo", {"values": [value] * 2000})
            write_tensors(folder / "scores.safetensors", "demo", {"a": torch.full((2000,), value)}, {"value": value})
    except BaseException as error:
        errors.append(repr(error))

threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
print("started", flush=True)
[t.start() for t in threads]
[t.join() for t in threads]
sys.exit("; ".join(errors) or 0)
"""


@contextmanager
def process(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


def test_two_processes_of_three_threads_write_the_same_files(tmp_path):
    reads, values = 0, set()
    with process(WORKER, tmp_path, 0, SAVES) as one, process(WORKER, tmp_path, 1, SAVES) as other:
        while one.poll() is None or other.poll() is None:
            if not (tmp_path / "scores.safetensors").exists():
                time.sleep(0.01)
                continue
            content = read_json(tmp_path / "scores.json", "demo")["values"]
            assert len(content) == 2000 and len(set(content)) == 1
            tensors, header = read_tensors(tmp_path / "scores.safetensors", "demo")  # with the digest verified
            assert (tensors["a"] == header["value"]).all()
            values.add(header["value"])
            reads += 1
        for worker in (one, other):
            _, errors = worker.communicate()
            assert (worker.returncode, errors) == (0, "")
    assert reads > 5 and len(values) > 1
    assert names(tmp_path) == ["scores.json", "scores.safetensors"]


def test_threads_of_one_process_do_not_remove_what_others_write(tmp_path):
    path, barrier = tmp_path / "file", threading.Barrier(3)
    errors = []

    def work(number):
        def write(temporary):
            barrier.wait(timeout=30)  # all three are writing at this moment
            temporary.write_text(str(number))

        try:
            write_atomically(path, write)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and names(tmp_path) == ["file"] and path.read_text() in {"0", "1", "2"}


# -- what killed processes leave -------------------------------------------------------------------------------------

BLOCKED = """
import sys, time
from hooked_mllm.storage import write_atomically

def write(temporary):
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(600)

write_atomically(sys.argv[1], write)
"""


def test_the_temporary_files_of_a_killed_process_are_removed_by_a_later_write(tmp_path):
    path = tmp_path / "file.json"
    with process(BLOCKED, path) as worker:
        assert worker.stdout is not None and worker.stdout.readline() == "writing\n"
        write_text(path, "by another process")
        (left,) = set(names(tmp_path)) - {"file.json"}  # it is still being written
        assert left.startswith(".file.json.") and left.endswith(".tmp")
    write_text(tmp_path / "other.json", "another file")
    assert left in names(tmp_path)
    write_text(path, "later")
    assert names(tmp_path) == ["file.json", "other.json"] and path.read_text() == "later"


def test_temporary_files_of_other_machines_are_removed_after_a_day(tmp_path):
    with process("") as ended:
        ended.wait()
    machine, token = "0" * 8, "1" * 8
    left = tmp_path / f".file.{machine}.{ended.pid}.{token}.tmp"
    left.mkdir()
    (left / "file").write_text("half")
    alike = tmp_path / f".file.{machine}.notes.tmp"  # not named by this package
    alike.mkdir()
    for path in (left, alike):
        os.utime(path, (time.time() - 23 * 3600,) * 2)
    write_text(tmp_path / "file", "first")
    assert left.exists()
    for path in (left, alike):
        os.utime(path, (time.time() - 25 * 3600,) * 2)
    write_text(tmp_path / "file", "second")
    assert names(tmp_path) == [alike.name, "file"]


def test_figures_are_png(tmp_path):
    write_figure(tmp_path / "figure", Figure(figsize=(2, 1)), dpi=50)
    data = (tmp_path / "figure").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (100, 50)


def test_json_is_readable_by_anything(tmp_path):
    write_json(tmp_path / "file", "demo", {"values": [0.1, None]})
    content = json.loads((tmp_path / "file").read_text())
    assert len(content.pop("digest")) == 32 and content == {"kind": "demo", "values": [0.1, None]}
