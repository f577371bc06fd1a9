"""Files by kind: what was written is what is read, and what was altered, damaged, pickled or of another kind is not."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hooked_mllm.errors import CacheFileError, HeadError, InputError
from hooked_mllm.heads import HeadScores, SampleScores
from hooked_mllm.storage import (
    ValueCheckpoint,
    described,
    from_lists,
    read_json,
    read_tensors,
    restoring,
    to_lists,
    write_json,
    write_tensors,
)

KIND = "hooked_mllm.demo"


def example() -> dict[str, torch.Tensor]:
    whole = torch.arange(12.0).view(3, 4)
    return {
        "whole": whole,
        "again": whole,
        "a part": whole[1],
        "transposed": whole.T,
        "half": torch.tensor([0.1, float("nan")], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "number": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 2),
        "gradient": torch.ones(2, requires_grad=True),
    }


def parts_of(path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and header as safetensors reads them."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["hooked_mllm"])


def test_tensors_round_trip(tmp_path):
    header = {"name": "größer \udcff", "values": [1, 0.1, None], "by": {10: "ten", 9: "nine"}}
    write_tensors(tmp_path / "file", KIND, example(), header)
    tensors, content = read_tensors(tmp_path / "file", KIND)
    assert tensors.keys() == example().keys()
    for name, expected in example().items():
        assert tensors[name].dtype == expected.dtype, name
        torch.testing.assert_close(tensors[name], expected.detach(), rtol=0, atol=0, equal_nan=True, msg=name)
    assert content == {"kind": KIND, **header, "by": {"10": "ten", "9": "nine"}}
    _, plain = parts_of(tmp_path / "file")
    assert plain.pop("digest") and plain == content


def test_one_of_several_kinds_with_versions(tmp_path):
    write_tensors(tmp_path / "file", "demo/2", {}, {})
    assert read_tensors(tmp_path / "file", "demo/1", "demo/2")[1] == {"format": "demo/2"}
    with pytest.raises(CacheFileError, match=r"holds 'demo/2'; expected 'demo/3'\. It was written by another version"):
        read_tensors(tmp_path / "file", "demo/3")
    with pytest.raises(CacheFileError, match=r"holds 'demo/2'; expected 'other/1' or 'other/2'\.$"):
        read_tensors(tmp_path / "file", "other/1", "other/2")


# -- the digest ------------------------------------------------------------------------------------------------------


def changed_number(tensors, header):
    tensors["whole"][1, 2] += 1


def changed_dtype(tensors, header):
    tensors["whole"] = tensors["whole"].view(torch.int32)


def changed_shape(tensors, header):
    tensors["whole"] = tensors["whole"].view(4, 3)


def swapped(tensors, header):
    tensors["whole"], tensors["transposed"] = tensors["transposed"].contiguous(), tensors["whole"]


def renamed(tensors, header):
    tensors["w"] = tensors.pop("whole")


def removed(tensors, header):
    del tensors["flags"]


def added(tensors, header):
    tensors["more"] = torch.ones(1)


def changed_header(tensors, header):
    header["steps"][0]["causal"] = False


def another_digest(tensors, header):
    header["digest"] = "0" * 32


CHANGES = [changed_number, changed_dtype, changed_shape, swapped, renamed, removed, added, changed_header]


@pytest.mark.parametrize("change", [*CHANGES, another_digest])
def test_a_file_that_was_altered_is_rejected(tmp_path, change):
    path = tmp_path / "file"
    write_tensors(path, KIND, example(), {"steps": [{"causal": True}]})
    tensors, header = parts_of(path)
    save_file(tensors, path, metadata={"hooked_mllm": json.dumps(header)})
    read_tensors(path, KIND)  # written again, but the same
    change(tensors, header)
    save_file(tensors, path, metadata={"hooked_mllm": json.dumps(header)})
    with pytest.raises(CacheFileError, match="does not match the digest.*Write the file again"):
        read_tensors(path, KIND)


def test_a_file_without_a_digest_is_read(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "file", metadata={"hooked_mllm": json.dumps({"kind": KIND, "n": 1})})
    with pytest.warns(UserWarning, match="file has no digest"):
        tensors, header = read_tensors(tmp_path / "file", KIND)
    assert torch.equal(tensors["a"], torch.ones(2)) and header == {"kind": KIND, "n": 1}


def test_the_digest_of_json(tmp_path):
    path = tmp_path / "file"
    write_json(path, KIND, {"values": [0.1, 1 / 3, None], "by": {10: "größer \udcff"}})
    assert read_json(path, KIND) == {"kind": KIND, "values": [0.1, 1 / 3, None], "by": {"10": "größer \udcff"}}
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content, indent=4))  # another form of the same content
    assert read_json(path, KIND)["values"] == [0.1, 1 / 3, None]
    path.write_text(json.dumps({**content, "values": [0.2, 1 / 3, None]}))
    with pytest.raises(CacheFileError, match="file is damaged or was altered"):
        read_json(path, KIND)
    path.write_text(json.dumps({"kind": KIND, "values": [0.2]}))
    with pytest.warns(UserWarning, match="file has no digest"):
        assert read_json(path, KIND)["values"] == [0.2]


# -- what is not read ------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


@pytest.mark.parametrize("read", [read_json, read_tensors])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_recognised_and_not_run(tmp_path, read, protocol):
    (tmp_path / "bare").write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    torch.save({"a": torch.ones(1)}, tmp_path / "zipped")
    for name in ("bare", "zipped"):
        with pytest.raises(CacheFileError, match="is a pickle, which this library never loads"):
            read(tmp_path / name, KIND)


@pytest.mark.parametrize("read", [read_json, read_tensors])
@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xfe", b"(lp0\n.", b"\x08\0\0\0\0\0\0\0{}      " * 2])
def test_damaged_files(tmp_path, read, data):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(CacheFileError, match=f"damaged or no (JSON|safetensors) file.*expected a {KIND} file"):
        read(tmp_path / "file", KIND)


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_files_that_cannot_be_opened(tmp_path, read):
    for path, message in ((tmp_path / "absent", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(CacheFileError, match=f"cannot be read: {message}"):
            read(path, KIND)


@pytest.mark.parametrize("bracket", ["[]", '{"a":}'])
def test_json_that_is_nested_too_deeply(tmp_path, bracket):
    opened, closed = bracket[:-1] * 100_000, bracket[-1] * 100_000
    deep = opened + ("1" if ":" in bracket else "") + closed
    (tmp_path / "deep.json").write_text(deep)
    with pytest.raises(CacheFileError, match="damaged: its JSON is nested too deeply"):
        read_json(tmp_path / "deep.json", KIND)
    save_file({}, tmp_path / "deep", metadata={"hooked_mllm": deep})
    with pytest.raises(CacheFileError, match="nested too deeply"):
        read_tensors(tmp_path / "deep", KIND)


@pytest.mark.parametrize("content", [[1, 2], "text", 3, None, {}, {"kind": None}, {"kind": [KIND]}])
def test_files_without_a_kind(tmp_path, content):
    (tmp_path / "file.json").write_text(json.dumps(content))
    save_file({}, tmp_path / "file", metadata={"hooked_mllm": json.dumps(content)})
    for read, name in ((read_json, "file.json"), (read_tensors, "file")):
        with pytest.raises(CacheFileError, match=f"holds something else; expected a {KIND} file"):
            read(tmp_path / name, KIND)
    save_file({"weight": torch.ones(1)}, tmp_path / "weights")
    with pytest.raises(CacheFileError, match="holds something else"):
        read_tensors(tmp_path / "weights", KIND)


def test_a_file_of_another_kind(tmp_path):
    write_json(tmp_path / "file.json", "curve", {})
    write_tensors(tmp_path / "file", "curve", {}, {})
    for read, name in ((read_json, "file.json"), (read_tensors, "file")):
        with pytest.raises(CacheFileError, match=f"holds curve; expected a {KIND} file"):
            read(tmp_path / name, KIND)


# -- rebuilding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KeyError("values"), "scores is damaged: the field 'values' is missing"),
        (TypeError("expected a list"), "scores is damaged: expected a list"),
        (OverflowError("int too large"), "scores is damaged: int too large"),
        (HeadError("a head too many"), "scores is damaged: a head too many"),
        (CacheFileError("scores is another run's"), "^scores is another run's$"),
    ],
)
def test_errors_of_rebuilding_are_those_of_the_file(error, message):
    with pytest.raises(CacheFileError, match=message), restoring("scores"):
        raise error


def test_errors_that_are_not_of_the_file_pass():
    with pytest.raises(KeyboardInterrupt), restoring("scores"):
        raise KeyboardInterrupt


def test_name_and_provenance_have_their_types():
    assert described({"name": "RAM", "provenance": {"n": 1}, "more": 2}) == {"name": "RAM", "provenance": {"n": 1}}
    for header in ({"name": None, "provenance": {}}, {"name": "RAM", "provenance": []}):
        with pytest.raises(TypeError, match="expected a text as its name"):
            described(header)
    with pytest.raises(KeyError):
        described({"name": "RAM"})


@pytest.mark.parametrize("values", [np.array([[0.1, np.nan], [-1e300, 2.0]]), np.zeros((2, 0)), np.array([1, 2])])
def test_arrays_as_lists(values):
    lists = json.loads(json.dumps(to_lists(values), allow_nan=False))
    np.testing.assert_array_equal(from_lists(lists), values)
    assert to_lists(torch.from_numpy(values)) == lists


def test_what_is_not_finite_is_not_written(tmp_path):
    for write in (
        lambda: write_json(tmp_path / "file", KIND, {"a": float("nan")}),
        lambda: write_tensors(tmp_path / "file", KIND, {}, {"a": float("inf")}),
    ):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write()
    assert not list(tmp_path.iterdir())


def circular():
    facts = {"list": []}
    facts["list"].append(facts)
    return facts


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Path("a"), r"PosixPath at 'provenance\.a\.1'"),
        (torch.ones(2), r"Tensor at 'provenance\.a\.1'"),
        (np.float32("nan"), r"float32 at 'provenance\.a\.1': Out of range float"),
        (np.ones(2), r"ndarray at 'provenance\.a\.1'"),
        (circular(), r"at 'provenance\.a\.1\.list\.0.*Circular reference"),
    ],
)
def test_what_json_cannot_hold_is_named(tmp_path, value, message):
    scores = HeadScores([[0.5]], provenance={"fine": 1, "a": [0, value]})
    with pytest.raises(InputError, match=f"Expected values that JSON can hold.*{message}"):
        scores.save(tmp_path / "scores")
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    numbers = {"n": np.int64(3), "share": np.float32(0.5), "flag": np.bool_(True)}
    HeadScores([[0.5]], provenance=numbers).save(tmp_path / "scores")
    assert HeadScores.load(tmp_path / "scores.json").provenance == {"n": 3, "share": 0.5, "flag": True}
    state = ValueCheckpoint(tmp_path / "state", {"config": numbers}, (1, 1))
    assert state.identity == {"config": {"n": 3, "share": 0.5, "flag": True}}
    drawn = SampleScores([[[0.5]], [[0.25]]]).draw(1, np.int64(3))
    assert type(drawn.provenance["seed"]) is int
