"""Cases in a process of their own depend neither on other plugins nor on the worker that starts them."""

import pytest

from helpers.own_process import run_cases

#: what pytest-benchmark 5.2 does in a worker of pytest-xdist
PLUGIN = """
import os, warnings

def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        warnings.warn("Benchmarks are automatically disabled because xdist plugin is active.")
"""


@pytest.fixture
def installed_plugin(tmp_path, monkeypatch):
    """A plugin that warns, installed as packages are: found by its entry point."""
    (tmp_path / "warning_plugin.py").write_text(PLUGIN, encoding="utf-8")
    info = tmp_path / "warning_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: warning-plugin\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[pytest11]\nwarning = warning_plugin\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")


def test_other_plugins_and_workers_change_nothing(installed_plugin, tmp_path):
    cases = tmp_path / "cases.py"
    cases.write_text(
        "import os, pytest\n\n"
        "def test_passed():\n    assert os.environ['TRITON_INTERPRET'] in '01' and os.environ['MORE'] == 'x'\n"
        "    assert 'PYTEST_XDIST_WORKER' not in os.environ\n\n"
        "@pytest.mark.skip\ndef test_skipped(): ...\n",
        encoding="utf-8",
    )
    assert run_cases(cases, MORE="x") == (1, 1)


def test_a_case_that_fails_is_shown(tmp_path):
    cases = tmp_path / "cases.py"
    cases.write_text("def test_wrong():\n    assert 1 + 1 == 3\n\n\ndef test_right(): ...\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"assert \(1 \+ 1\) == 3[\s\S]*1 failed, 1 passed"):
        run_cases(cases)
