"""Files that data name are those of their folder, wherever links and `..` lead."""

import pytest

from hooked_mllm.errors import InputError
from hooked_mllm.storage import inside


def test_paths_in_the_folder(tmp_path):
    (tmp_path / "data" / "below").mkdir(parents=True)
    (tmp_path / "data" / "link").symlink_to("below")
    for name in ("a", "below/a", "link/a", "below/../a"):
        assert inside(tmp_path / "data", name, advice="") == tmp_path / "data" / name
    assert inside(tmp_path / "data", "../a", root=tmp_path, advice="") == tmp_path / "data" / "../a"


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "", None, 3, "a\0", "link/a", "below/../../data2/a"])
def test_paths_outside_the_folder(tmp_path, name):
    (tmp_path / "data" / "below").mkdir(parents=True)
    (tmp_path / "data2").mkdir()  # its path begins with that of the folder
    (tmp_path / "data" / "link").symlink_to(tmp_path / "data2")
    with pytest.raises(InputError, match="which is outside it. Copy it"):
        inside(tmp_path / "data", name, advice="Copy it.")


def test_a_circle_of_links(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match="cannot be followed: .* Copy it"):
        inside(tmp_path, "a/c", advice="Copy it.")
