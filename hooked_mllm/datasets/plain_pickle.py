"""Reads pickles of plain data: no class, no function, no code, and bounded in size and depth."""

import io
import pickle
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError

#: bytes of a file, of which RefCOCOg's largest has 34 million
MAX_BYTES = 1 << 28
#: containers in one another
MAX_DEPTH = 32
#: what makes plain data; opcodes of classes, functions, sets, bytes and outside objects are not among them
_OPCODES = """PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT
BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_TUPLE TUPLE TUPLE1
TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET
LONG_BINGET"""
_CODE = ("GLOBAL", "STACK_GLOBAL", "INST")  # opcodes that look up a callable, whose name the error states


class _Memo(dict[int, Any]):
    """The memo of an unpickler; a pickler numbers its entries, so that no number exceeds the bytes of the file."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def __setitem__(self, index: int, value: object) -> None:
        if index > self.size:
            raise pickle.UnpicklingError(f"it has {self.size} bytes and a memo of {index} entries")
        super().__setitem__(index, value)


#: the one in C allocates a memo of any size, and ends the process
_PythonUnpickler: Any = pickle._Unpickler


class _PlainUnpickler(_PythonUnpickler):
    """An unpickler of the opcodes of plain data; keys are text or numbers, because hashing nested tuples recurses."""

    dispatch: ClassVar[dict[int, Any]] = {
        opcode[0]: _PythonUnpickler.dispatch[opcode[0]]
        for opcode in (getattr(pickle, name) for name in (*_OPCODES.split(), *_CODE))
    }

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}, and code is never loaded")

    def _check_keys(self, keys: list[Any]) -> None:
        for key in keys:
            if not isinstance(key, str | int | float | None):
                raise pickle.UnpicklingError(f"a key of a dict is a {type(key).__name__}")

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack[::2])
        super().load_dict()

    dispatch |= {pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems, pickle.DICT[0]: load_dict}


@checked
def load_plain_pickle(path: str | Path) -> Any:
    """Read a pickle of dicts, lists, tuples, strings, numbers and None, of Python 2 or 3.

    Python 2 strings are decoded as UTF-8, or as Latin-1 where that fails. Files of more than 256 MiB, and containers
    nested more than 32 deep, are rejected.

    Raises:
        InputError: The file is missing, too large, is not a pickle, is truncated, or contains an object of another
            kind.

    Examples:
        >>> import pickle, tempfile, pathlib
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "refs.p"
        >>> _ = file.write_bytes(pickle.dumps([{"ann_id": 7}], protocol=0))
        >>> load_plain_pickle(file)
        [{'ann_id': 7}]
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} has more than {MAX_BYTES} bytes: split it, or convert it to JSON")
    for encoding in ("utf-8", "latin-1"):
        try:
            return _load(data, encoding)
        except UnicodeDecodeError:
            continue
        except Exception as error:  # a damaged stream raises errors of nearly every kind
            what = str(error) or "it is cut off"
            if type(error) is KeyError:  # the byte of an opcode or the number of an entry of the memo
                what = f"it contains the opcode or entry {error}"
            raise InputError(
                f"{path} is not a pickle of plain data: {what}. "
                f"Expected dicts, lists, strings and numbers only, as in the published file"
            ) from error
    raise InputError(f"{path} is not a pickle of plain data: its strings are not text")


def _load(data: bytes, encoding: str) -> Any:
    unpickler = _PlainUnpickler(io.BytesIO(data), encoding=encoding)
    unpickler.memo = _Memo(len(data))
    value = unpickler.load()
    _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    """Raise for containers nested deeper than `MAX_DEPTH`, level by level: without recursion, each container once."""
    level, n = [value], 0
    while level:
        inner: dict[int, object] = {}
        for container in level:
            if isinstance(container, dict | list | tuple):
                children = container.values() if isinstance(container, dict) else container
                inner.update((id(child), child) for child in children if isinstance(child, dict | list | tuple))
        level, n = list(inner.values()), n + 1
        if n > MAX_DEPTH:
            raise pickle.UnpicklingError(f"it is nested more than {MAX_DEPTH} deep")
