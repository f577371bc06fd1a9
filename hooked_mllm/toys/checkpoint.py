"""The checkpoints that come with the package, by name."""

from pathlib import Path

from hooked_mllm.errors import InputError, nearest

_HOME = Path(__file__).parent


def bundled() -> tuple[str, ...]:
    """Names of the bundled checkpoints.

    Examples:
        >>> "toy-qwen3-vl" in bundled()
        True
    """
    return tuple(sorted(p.parent.name for p in _HOME.glob("*/config.json")))


def path(name: str) -> Path:
    """The folder of a bundled checkpoint, as `from_pretrained` takes it.

    Raises:
        InputError: no checkpoint of that name comes with the package.

    Examples:
        >>> path("toy-qwen3-vl").name
        'toy-qwen3-vl'
    """
    if name not in bundled():
        raise InputError(
            f"expected a bundled checkpoint, one of {', '.join(bundled())}; got {name!r}. {nearest(name, bundled())}"
        )
    return _HOME / name


def resolve(name_or_path: str) -> str:
    """The folder of a bundled checkpoint when `name_or_path` names one, else `name_or_path` unchanged.

    A folder of that name in the working directory does not hide the bundled one.

    Examples:
        >>> resolve("Qwen/Qwen3-VL-4B-Instruct")
        'Qwen/Qwen3-VL-4B-Instruct'
    """
    return str(path(name_or_path)) if name_or_path in bundled() else name_or_path
