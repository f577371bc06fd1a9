"""The bundled checkpoints, by name."""

import os
from pathlib import Path

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError, nearest

_HOME = Path(__file__).parent


@checked
def bundled() -> tuple[str, ...]:
    """Names of the bundled checkpoints.

    Examples:
        >>> "toy-qwen3-vl" in bundled()
        True
    """
    return tuple(sorted(p.parent.name for p in _HOME.glob("*/config.json")))


@checked
def path(name: str) -> Path:
    """The folder of a bundled checkpoint, for `from_pretrained`.

    Examples:
        >>> path("toy-qwen3-vl").name
        'toy-qwen3-vl'
    """
    if name not in bundled():
        raise InputError(
            f"expected a bundled checkpoint, one of {', '.join(bundled())}; got {name!r}. {nearest(name, bundled())}"
        )
    return _HOME / name


@checked
def resolve(name_or_path: str | os.PathLike[str]) -> str:
    """The folder of a bundled checkpoint if `name_or_path` is the name of one, else `name_or_path` unchanged.

    The bundled checkpoint takes precedence over a folder of the same name in the working directory.

    Examples:
        >>> resolve("Qwen/Qwen3-VL-4B-Instruct")
        'Qwen/Qwen3-VL-4B-Instruct'
    """
    name = os.fspath(name_or_path)
    return str(path(name)) if name_or_path in bundled() else name
