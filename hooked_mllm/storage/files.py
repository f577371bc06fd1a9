"""Files by kind: JSON for small results, safetensors for tensors, both with their kind in them, and never a pickle."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_mllm.errors import CacheFileError, HookedMLLMError, InputError
from hooked_mllm.storage.writing import as_path, write_atomically, write_text

#: the entry of safetensors metadata that holds the header
_HEADER = "hooked_mllm"
#: how often a file that others replace meanwhile is read again
_ATTEMPTS = 100
_PICKLE = (b"\x80", b"PK\x03\x04")  # a bare pickle; torch.save's zip of one


def json_text(content: Mapping[str, Any], *, allow_nan: bool = False) -> str:
    """`content` as JSON, NumPy numbers as Python's; an InputError with the key of a value that JSON cannot hold."""
    options: dict[str, Any] = {"allow_nan": allow_nan, "default": _python_number}
    try:
        return json.dumps(content, **options)
    except (TypeError, ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
    keys: list[str] = []
    value: Any = content
    around: set[int] = set()
    while id(value) not in around:  # down to the innermost value that cannot be written
        around.add(id(value))
        items = enumerate(value) if isinstance(value, list | tuple) else getattr(value, "items", tuple)()
        for key, item in items:
            try:
                json.dumps(item, **options)
            except (TypeError, ValueError, RecursionError):
                keys.append(str(key))
                value = item
                break
    at = ".".join(keys) or "the content"
    raise InputError(
        f"Expected values that JSON can hold (text, finite numbers, lists, mappings of text); got "
        f"{type(value).__name__} at {at!r}: {reason}. Convert it, for example by str(), or remove it."
    )


def _python_number(value: object) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


def write_json(path: str | os.PathLike[str], kind: str, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON with its kind and a digest. Numbers must be finite: write a gap as None."""
    plain = json.loads(json_text({_tag(kind): kind, **content}))
    plain["digest"] = _digest(plain, {})
    write_text(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def write_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write tensors as safetensors, with the kind, `header` (JSON) and a digest of all of them in the metadata."""
    content = json.loads(json_text({_tag(kind): kind, **header}))
    plain = _on_cpu(tensors)
    content["digest"] = _digest(content, plain)
    metadata = {_HEADER: json.dumps(content)}
    write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=metadata))


def read_json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read a JSON file of this kind; the digest is verified as in `read_tensors`.

    Raises:
        CacheFileError: If the file is missing, damaged, altered, a pickle, or of another kind.
    """
    path = as_path(path)
    raw = read_bytes(path)
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, (kind,), "JSON", error) from None
    return _verified(path, _check_kind(path, (kind,), content), {})


def read_tensors(path: str | os.PathLike[str], *kinds: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header of a safetensors file of one of these kinds.

    The digest is verified. Files of earlier versions have none, which a warning states.

    Raises:
        CacheFileError: If the file is missing, damaged, altered, a pickle, or of another kind.
    """
    path = as_path(path)
    for _ in range(_ATTEMPTS):
        with _opened(path) as file:
            try:
                outcome = _load_tensors(path, kinds)
            except CacheFileError as error:
                outcome = error
            # safetensors opens the path twice: if it is still this file, both were
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                if isinstance(outcome, CacheFileError):
                    raise outcome
                return outcome
    raise CacheFileError(f"{path} cannot be read: it was replaced in each of {_ATTEMPTS} attempts.")


@contextmanager
def restoring(path: str | os.PathLike[str]) -> Iterator[None]:
    """Report errors of rebuilding an object from the content of `path` as a `CacheFileError`: a damaged file.

    Examples:
        >>> with restoring("scores.json"):
        ...     int("many")
        Traceback (most recent call last):
        hooked_mllm.errors.CacheFileError: scores.json is damaged: invalid literal for int() with base 10: 'many'
    """
    try:
        yield
    except CacheFileError:
        raise
    except HookedMLLMError as error:
        raise CacheFileError(f"{path} is damaged: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        message = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise CacheFileError(f"{path} is damaged: {message}") from error


def to_lists(values: np.ndarray | Tensor) -> Any:
    """Nested lists of numbers for JSON, with None for NaN.

    Examples:
        >>> to_lists(np.array([[0.5, np.nan]]))
        [[0.5, None]]
    """
    values = np.asarray(values)
    plain = values.astype(object)
    plain[np.isnan(values)] = None
    return plain.tolist()


def from_lists(values: Any) -> np.ndarray:
    """The float64 array of which `to_lists` made the lists.

    Examples:
        >>> from_lists([[0.5, None]])
        array([[0.5, nan]])
    """
    return np.array(values, dtype=np.float64)  # None becomes NaN


def described(header: Mapping[str, Any]) -> dict[str, Any]:
    """The name (text) and the provenance (a dictionary) in a header, as arguments of what has both.

    Examples:
        >>> described({"kind": "scores", "name": "RAM", "provenance": {}})
        {'name': 'RAM', 'provenance': {}}
    """
    name, provenance = header["name"], header["provenance"]
    if not isinstance(name, str) or not isinstance(provenance, dict):
        raise TypeError("expected a text as its name and a mapping as its provenance")
    return {"name": name, "provenance": provenance}


def _tag(kind: str) -> str:
    """The key under which a file states its kind: "format" for kinds with a version, such as "name/2"."""
    return "format" if "/" in kind else "kind"


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, on the CPU, no memory shared between two of them."""
    plain, storages = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        address = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if address in storages else value
        storages.add(address)
    return plain


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, 32 digits of it, over the header as read from JSON and names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _load_tensors(path: Path, kinds: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = _check_kind(path, kinds, json.loads((file.metadata() or {}).get(_HEADER, "null")))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, _verified(path, header, tensors)
    except CacheFileError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:  # RecursionError is a RuntimeError
        raise _unreadable(path, kinds, "safetensors", error) from None


def _verified(path: Path, header: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header without its digest, which must be that of header and tensors."""
    if "digest" not in header:
        warnings.warn(
            f"{path} has no digest, as files of earlier versions: changes to it cannot be detected. Save it again.",
            stacklevel=5,
        )
    elif header.pop("digest") != _digest(header, tensors):
        raise CacheFileError(
            f"{path} is damaged or was altered: its content does not match the digest that was written with it. "
            "Write the file again."
        )
    return header


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise CacheFileError(f"{path} cannot be read: {error.strerror or error}.") from None


def read_bytes(path: Path, n: int = -1) -> bytes:
    """The first `n` bytes of a file, or all."""
    with _opened(path) as file:
        return file.read(n)


def _named(kinds: tuple[str, ...]) -> str:
    return " or ".join(repr(kind) if "/" in kind else f"a {kind} file" for kind in kinds)


def _unreadable(path: Path, kinds: tuple[str, ...], form: str, error: Exception) -> CacheFileError:
    # only after reading failed: an intact safetensors file may begin with these bytes, too
    if read_bytes(path, 4).startswith(_PICKLE):
        return CacheFileError(f"{path} is a pickle, which this library never loads; expected {_named(kinds)} ({form}).")
    if isinstance(error, RecursionError):
        return CacheFileError(f"{path} is damaged: its {form} is nested too deeply; expected {_named(kinds)}.")
    return CacheFileError(f"{path} is damaged or no {form} file ({error}); expected {_named(kinds)}.")


def _check_kind(path: Path, kinds: tuple[str, ...], content: Any) -> dict[str, Any]:
    kind = content.get("kind", content.get("format")) if isinstance(content, dict) else None
    if kind in kinds:
        return content
    if not isinstance(kind, str):
        raise CacheFileError(f"{path} holds something else; expected {_named(kinds)}.")
    text = f"{path} holds {repr(kind) if '/' in kind else kind}; expected {_named(kinds)}."
    if "/" in kind and kind.split("/")[0] == kinds[-1].split("/")[0]:
        text += " It was written by another version of hooked_mllm: use another file, or that version."
    raise CacheFileError(text)
