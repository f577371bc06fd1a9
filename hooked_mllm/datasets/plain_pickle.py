"""Reads pickles of plain data: no class, no function, no code."""

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn

from hooked_mllm.errors import InputError


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler without globals: opcodes that run code look up a callable first, and every look-up raises."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and code is never loaded")

    def persistent_load(self, pid: object) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to an object outside the file ({pid!r})")


def load_plain_pickle(path: str | Path) -> Any:
    """Read a pickle of dicts, lists, tuples, strings, numbers and None, of Python 2 or 3.

    Python 2 strings are decoded as UTF-8, or as Latin-1 where that fails.

    Raises:
        InputError: the file is missing, is not a pickle, is truncated, or contains an object of another kind.

    Examples:
        >>> import pickle, tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "refs.p"
        >>> _ = file.write_bytes(pickle.dumps([{"ann_id": 7}], protocol=0))
        >>> load_plain_pickle(file)
        [{'ann_id': 7}]
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    for encoding in ("utf-8", "latin-1"):
        try:
            return _PlainUnpickler(io.BytesIO(data), encoding=encoding).load()
        except UnicodeDecodeError:
            continue
        except Exception as error:  # a damaged stream raises errors of nearly every kind
            raise InputError(
                f"{path} is not a pickle of plain data: {error}. "
                f"Expected dicts, lists, strings and numbers only, as in the published file"
            ) from error
    raise InputError(f"{path} is not a pickle of plain data: its strings are not text")
