"""Folders of tiny checkpoints, which tests of loading change."""

import shutil
from pathlib import Path

import pytest

from helpers.tiny import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny("qwen3_vl", tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))
