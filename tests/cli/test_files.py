"""The folder of results, and the bar that transformers shows while it loads."""

import pytest
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from hooked_mllm.cli.files import folder, loading_bar
from hooked_mllm.errors import InputError


def test_a_folder_is_made(tmp_path):
    made = folder(tmp_path / "a" / "b")
    assert made.is_dir() and folder(made) == made and not list(made.iterdir())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("results of another run")
    with pytest.raises(InputError, match="^--out: "):
        folder(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "results of another run"


@pytest.fixture
def bar():
    """The bar is as it was after the test."""
    before = is_progress_bar_enabled()
    yield
    (enable_progress_bar if before else disable_progress_bar)()


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_bar_is_shown_if_it_is_on_and_not_switched_off(bar, shown, enabled):
    (enable_progress_bar if enabled else disable_progress_bar)()
    with loading_bar(shown):
        assert is_progress_bar_enabled() == (shown and enabled)
    assert is_progress_bar_enabled() == enabled
    with pytest.raises(KeyboardInterrupt), loading_bar(shown):
        raise KeyboardInterrupt
    assert is_progress_bar_enabled() == enabled
