"""Files that data name: only those in the folder of the data."""

from pathlib import Path

from hooked_mllm.errors import InputError


def inside(folder: str | Path, name: object, *, advice: str, root: Path | None = None) -> Path:
    """The path `folder / name` of a file that data name, if it is in `root` once links and `..` are followed.

    Args:
        folder: The folder that `name` is relative to.
        name: A relative path, as read from the data.
        advice: What to do where the file is elsewhere, for the error.
        root: The folder that the file must be in; `folder` by default.

    Raises:
        InputError: If `name` is no relative path, or leads out of the folder.
    """
    root = Path(folder if root is None else root).resolve()
    if isinstance(name, str) and name and "\0" not in name and not Path(name).is_absolute():
        path = Path(folder) / name
        try:
            path.exists()  # raises for a name that the system does not allow
            if path.resolve().is_relative_to(root):
                return path
        except (OSError, RuntimeError) as error:  # a circle of links, a name that is too long
            raise InputError(f"The path {name!r} in {folder} cannot be followed: {error}. {advice}") from error
    raise InputError(f"Expected a file in {root}; got {name!r}, which is outside it. {advice}")
