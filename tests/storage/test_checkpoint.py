"""Checkpoints: the same run continues from them; for another, the error names what differs."""

import json

import numpy as np
import pytest
import torch

from hooked_mllm.errors import CacheFileError
from hooked_mllm.storage import Checkpoint, ValueCheckpoint, read_tensors, to_lists, write_json, write_tensors

KIND = "hooked_mllm.demo"
IDENTITY = {"model": "toy", "settings": {"k": [1, 2]}, "limit": float("inf"), "undefined": float("nan")}


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "new" / "state"
    checkpoint = Checkpoint(path, KIND, IDENTITY)
    assert checkpoint.read() is None and list(path.parent.iterdir()) == []
    checkpoint.write({"a": torch.arange(3)}, done=["one"])
    kept = Checkpoint(str(path), KIND, IDENTITY).read()
    assert kept is not None
    tensors, header = kept
    assert tensors["a"].tolist() == [0, 1, 2] and header["done"] == ["one"]
    json.dumps(header, allow_nan=False)


def test_without_a_path_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint(None, KIND, IDENTITY)
    checkpoint.write({"a": torch.ones(1)})
    assert checkpoint.read() is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({**IDENTITY, "model": "tiny"}, r'differs in model \("toy" in the file, "tiny" now\)\. Use another file'),
        ({**IDENTITY, "seed": 3}, r"differs in seed \(null in the file, 3 now\)\."),
        ({k: v for k, v in IDENTITY.items() if k != "model"}, r'differs in model \("toy" in the file, null now\)\.'),
        ({**IDENTITY, "settings": {"k": list(range(40))}}, r"differs in settings\."),
        ({**IDENTITY, "limit": 1.0, "model": "x" * 50}, r'differs in model, limit \("Infinity" in the file, 1.0 now\)'),
    ],
)
def test_another_run_is_rejected(tmp_path, now, message):
    path = tmp_path / "state"
    Checkpoint(path, KIND, IDENTITY).write({})
    before = path.read_bytes()
    with pytest.raises(CacheFileError, match=f"is the checkpoint of another run: it {message}"):
        Checkpoint(path, KIND, now).read()
    assert path.read_bytes() == before


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "state"
    for header in ({}, {"identity": 3}, {"identity": None}):
        write_tensors(path, KIND, {}, header)
        with pytest.raises(CacheFileError, match="state is damaged"):
            Checkpoint(path, KIND, IDENTITY).read()
    path.write_bytes(b"junk")
    with pytest.raises(CacheFileError, match=f"damaged.*expected a {KIND} file"):
        Checkpoint(path, KIND, IDENTITY).read()
    with pytest.raises(CacheFileError, match="is a folder"):
        Checkpoint(tmp_path, KIND, IDENTITY)


def test_identities_of_earlier_versions(tmp_path):
    write_tensors(tmp_path / "state", KIND, {"a": torch.ones(1)}, {"settings": {"lr": 0.1}})
    assert Checkpoint(tmp_path / "state", KIND, {"lr": 0.1}).read() is not None
    with pytest.raises(CacheFileError, match=r"differs in lr \(0.1 in the file, 0.2 now\)"):
        Checkpoint(tmp_path / "state", KIND, {"lr": 0.2}).read()


# -- values ----------------------------------------------------------------------------------------------------------


def test_values_are_saved_every_so_many_and_continue(tmp_path):
    path = tmp_path / "state"
    state = ValueCheckpoint(path, IDENTITY, (2, 3))
    assert np.isnan(state.values).all()
    state.save()
    assert not path.exists()  # nothing new
    state.values[0, 0] = 0.5
    state.tick(2)
    assert not path.exists()
    state.values[0, 1] = -1.0
    state.tick(2)
    expected = np.array([[0.5, -1.0, np.nan], [np.nan] * 3])
    np.testing.assert_array_equal(read_tensors(path, ValueCheckpoint.KIND)[0]["values"].numpy(), expected)
    again = ValueCheckpoint(path, IDENTITY, (2, 3))
    np.testing.assert_array_equal(again.values, expected)
    again.values[1] = 7.0  # what was read can be written to
    again.tick(100)
    again.save()
    np.testing.assert_array_equal(ValueCheckpoint(path, IDENTITY, (2, 3)).values[1], [7.0] * 3)


def test_values_of_another_run_or_shape(tmp_path):
    path = tmp_path / "state"
    state = ValueCheckpoint(path, IDENTITY, (2, 3))
    state.tick(1)
    with pytest.raises(CacheFileError, match="differs in model"):
        ValueCheckpoint(path, {**IDENTITY, "model": "tiny"}, (2, 3))
    with pytest.raises(CacheFileError, match=r"damaged: expected values \(2, 4\), got \(2, 3\)"):
        ValueCheckpoint(path, IDENTITY, (2, 4))
    write_tensors(path, ValueCheckpoint.KIND, {}, {"identity": state.identity})
    with pytest.raises(CacheFileError, match="the field 'values' is missing"):
        ValueCheckpoint(path, IDENTITY, (2, 3))


def test_values_that_earlier_versions_wrote_as_json(tmp_path):
    path, values = tmp_path / "state.json", np.array([[0.25, np.nan]])
    identity = {"model": "toy"}
    write_json(path, ValueCheckpoint.KIND, {"identity": identity, "values": to_lists(values)})
    state = ValueCheckpoint(path, identity, (1, 2))
    np.testing.assert_array_equal(state.values, values)
    state.values[0, 1] = 1.0
    state.tick(1)
    np.testing.assert_array_equal(ValueCheckpoint(path, identity, (1, 2)).values, [[0.25, 1.0]])
    write_json(path, ValueCheckpoint.KIND, {"identity": identity, "values": [["many"]]})
    with pytest.raises(CacheFileError, match="state.json is damaged"):
        ValueCheckpoint(path, identity, (1, 2))
    with pytest.raises(CacheFileError, match="differs in model"):
        ValueCheckpoint(path, {"model": "tiny"}, (1, 2))
