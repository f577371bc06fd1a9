"""Small results on disk: JSON for people, safetensors for exact tensors, never a pickle.

Every file is whole in itself and says what kind it is. It is written under a temporary name and renamed, so that a
reader finds the old file or the new one and nothing between.
"""

import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_mllm.errors import CacheFileError

_HEADER = "hooked_mllm"
_PICKLE = (b"\x80", b"PK\x03\x04")  # a bare pickle; torch.save's zip of one


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON with its kind. Numbers must be finite: write a gap as None."""
    text = json.dumps({"kind": kind, **content}, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(path, lambda temporary: _write_text(temporary, text + "\n"))


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, with the kind and `header` (JSON) in the file's metadata."""
    metadata = {_HEADER: json.dumps({"kind": kind, **header}, allow_nan=False, ensure_ascii=False)}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=metadata))


def read_json(path: Path, kind: str) -> dict[str, Any]:
    """Read a JSON file of this kind.

    Raises:
        CacheFileError: if the file is missing, damaged, a pickle, or of another kind.
    """
    raw = _read_bytes(path)
    try:
        content = json.loads(raw.decode("utf-8"))
    except ValueError as error:
        raise _unreadable(path, kind, "JSON", error) from None
    return _check_kind(path, kind, content)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header of a safetensors file of this kind.

    Raises:
        CacheFileError: if the file is missing, damaged, a pickle, or of another kind.
    """
    _read_bytes(path, 0)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = json.loads(metadata.get(_HEADER, "null"))
    except (SafetensorError, ValueError) as error:
        raise _unreadable(path, kind, "safetensors", error) from None
    return tensors, _check_kind(path, kind, header)


def _read_bytes(path: Path, n: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(n)
    except OSError as error:
        raise CacheFileError(f"{path} cannot be read: {error.strerror or error}.") from None


def _unreadable(path: Path, kind: str, form: str, error: Exception) -> CacheFileError:
    # asked only once reading failed: a sound safetensors file may begin with these bytes too
    if _read_bytes(path, 4).startswith(_PICKLE):
        return CacheFileError(f"{path} is a pickle, which this library never loads; expected a {kind} file ({form}).")
    return CacheFileError(f"{path} is damaged or no {form} file ({error}); expected a {kind} file.")


def _check_kind(path: Path, kind: str, content: Any) -> dict[str, Any]:
    found = content.get("kind") if isinstance(content, dict) else None
    if found != kind:
        raise CacheFileError(f"{path} holds {found or 'something else'}; expected a {kind} file.")
    return content


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
