"""Scores on disk: exact both ways, whole or absent, and never a pickle."""

import pickle

import numpy as np
import pytest
import torch

from hooked_mllm.errors import CacheFileError, InputError
from hooked_mllm.heads import HeadScores
from hooked_mllm.heads.head_scores import KIND
from hooked_mllm.storage import read_json, write_json


def sample_scores():
    values = np.random.default_rng(0).standard_normal((3, 4)) / 3
    provenance = {"model": "toy", "samples": ["a", "b"], "config": {"queries": "question"}, "note": "größer"}
    return HeadScores(values, name="RAM", provenance=provenance, counts=[7, 7, 0], missing=[2])


@pytest.mark.parametrize("suffix", ["", ".json", ".safetensors"])
def test_what_is_loaded_is_what_was_saved(tmp_path, suffix):
    scores = sample_scores()
    scores.save(tmp_path / f"deep/run.v1{suffix}" if suffix else tmp_path / "deep/run.v1")
    names = sorted(path.name for path in (tmp_path / "deep").iterdir())
    assert names == ["run.v1.json", "run.v1.safetensors"]
    loaded = HeadScores.load(tmp_path / f"deep/run.v1{suffix}")
    assert loaded == scores and loaded.provenance == scores.provenance


def test_each_file_is_whole_by_itself(tmp_path):
    sample_scores().save(tmp_path / "scores")
    (tmp_path / "scores.json").unlink()
    assert HeadScores.load(tmp_path / "scores.safetensors") == sample_scores()


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_pickle_is_never_loaded(tmp_path, suffix):
    bare, zipped = tmp_path / f"bare{suffix}", tmp_path / f"zipped{suffix}"
    bare.write_bytes(pickle.dumps({"values": [[1.0]]}))
    torch.save({"values": torch.ones(1, 1)}, zipped)
    for path in (bare, zipped):
        with pytest.raises(CacheFileError, match="is a pickle, which this library never loads"):
            HeadScores.load(path)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 60, -3])
def test_a_damaged_file_is_named(tmp_path, suffix, keep):
    sample_scores().save(tmp_path / "scores")
    path = tmp_path / f"scores{suffix}"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheFileError, match="damaged"):
        HeadScores.load(path)


def test_a_file_of_another_kind_is_named(tmp_path):
    sample_scores().save(tmp_path / "scores")
    content = read_json(tmp_path / "scores.json", KIND)
    for change, message in (
        ({"kind": "curve"}, "holds curve; expected a hooked_mllm.HeadScores"),
        ({"name": None}, "damaged: expected a text as its name"),
        ({"provenance": "toy"}, "damaged: expected a text as its name and a mapping as its provenance"),
        ({"missing": [7]}, "damaged: Missing layer 7"),
        ({"counts": [["many"]]}, "damaged"),
        ({"values": [[0.5]]}, "damaged"),
        ({"values": "many"}, "damaged"),
    ):
        write_json(tmp_path / "other.json", KIND, {**content, **change})
        with pytest.raises(CacheFileError, match=message):
            HeadScores.load(tmp_path / "other.json")
    (tmp_path / "list.json").write_text("[1, 2]")
    with pytest.raises(CacheFileError, match="something else"):
        HeadScores.load(tmp_path / "list.json")
    with pytest.raises(CacheFileError, match="cannot be read"):
        HeadScores.load(tmp_path / "absent")


@pytest.mark.parametrize("blocked", ["scores.json", "scores.safetensors"])
def test_both_paths_are_checked_before_one_is_written(tmp_path, blocked):
    (tmp_path / blocked).mkdir()
    with pytest.raises(CacheFileError, match=f"{blocked} cannot be written: it is a folder"):
        sample_scores().save(tmp_path / "scores")
    assert [p.name for p in tmp_path.iterdir()] == [blocked]
    for path in ("", "."):
        with pytest.raises(InputError, match="Expected the path of a file"):
            sample_scores().save(path)


def test_altered_scores_are_rejected(tmp_path):
    sample_scores().save(tmp_path / "scores")
    path = tmp_path / "scores.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheFileError, match="does not match the digest"):
        HeadScores.load(path)


def test_provenance_that_is_no_json_is_rejected_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"'provenance\.model'"):
        HeadScores([[1.0]], provenance={"model": object()}).save(tmp_path / "scores")
    assert not list(tmp_path.iterdir())
