import os
import pickle
import re
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mllm.datasets import load_plain_pickle
from hooked_mllm.errors import InputError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


class Malicious:
    def __init__(self, callable_, *args):
        self.call = callable_, args

    def __reduce__(self):
        return self.call


@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_is_read(tmp_path_factory, value, protocol):
    file = tmp_path_factory.mktemp("p") / "x.p"
    file.write_bytes(pickle.dumps(value, protocol))
    assert load_plain_pickle(file) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_rejected_before_it_runs(tmp_path, protocol):
    touched, file = tmp_path / "touched", tmp_path / "refs(umd).p"
    file.write_bytes(pickle.dumps([{"ann_id": Malicious(os.mkdir, str(touched))}], protocol))
    pickle.loads(file.read_bytes())  # it is dangerous: the plain reader runs it
    assert touched.is_dir()
    touched.rmdir()
    with pytest.raises(InputError, match=r"names (posix|nt|os)\.mkdir, and code is never loaded"):
        load_plain_pickle(file)
    assert not touched.exists()


def hand_written(tmp_path: Path) -> dict[str, bytes]:
    """Other ways to a callable than GLOBAL and REDUCE."""
    target = str(tmp_path / "touched").encode()
    text = b"X" + struct.pack("<I", len(target)) + target
    return {
        "inst": b"(" + text + b"ios\nmkdir\n.",
        "obj": b"(cos\nmkdir\n" + text + b"o.",
        "stack-global": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + text + b"\x85R.",
        "newobj": b"\x80\x02cos\nmkdir\n" + text + b"\x85\x81.",
        "persistent": b"Psecret\n.",
        "extension": b"\x80\x02\x82\x01.",
    }


@pytest.mark.parametrize("kind", ["inst", "obj", "stack-global", "newobj", "persistent", "extension"])
def test_every_opcode_that_reaches_code_is_rejected(tmp_path, kind):
    file = tmp_path / "x.p"
    file.write_bytes(hand_written(tmp_path)[kind])
    with pytest.raises(InputError, match="not a pickle of plain data"):
        load_plain_pickle(file)
    assert not (tmp_path / "touched").exists()


def test_other_classes_are_rejected_too(tmp_path):
    file = tmp_path / "x.p"
    file.write_bytes(pickle.dumps(OrderedDict(a=1)))
    with pytest.raises(InputError, match=r"collections\.OrderedDict"):
        load_plain_pickle(file)


def test_python_2_strings(tmp_path):
    # what Python 2 wrote for [{'sent': 'caf\xc3\xa9'}] and [{'sent': 'caf\xe9'}] with protocol 0
    file = tmp_path / "x.p"
    file.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsa.")
    assert load_plain_pickle(file) == [{"sent": "café"}]
    file.write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsa.")
    assert load_plain_pickle(file) == [{"sent": "café"}]


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"\x80\x02]q\x00("], ids=["empty", "text", "cut"])
def test_damaged(tmp_path, data):
    file = tmp_path / "x.p"
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"x\.p is not a pickle of plain data"):
        load_plain_pickle(file)


def test_missing(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.p"):
        load_plain_pickle(tmp_path / "nowhere.p")


MARKS, ONES = b"(" * 100_000 + b"t" * 100_000, b")" + b"\x85" * 200_000
UNBOUNDED = {
    "nested-marks": (MARKS + b".", "nested more than 32 deep"),
    "nested-tuples": (b"\x80\x02" + ONES + b".", "nested more than 32 deep"),
    "key-of-items": (b"\x80\x02}(" + ONES + b"K\x01u.", "a key of a dict is a tuple"),
    "key-of-one-item": (b"\x80\x02}" + ONES + b"K\x01s.", "a key of a dict is a tuple"),
    "key-of-dict": (b"(" + ONES + b"K\x01d.", "a key of a dict is a tuple"),
    "circle": (b"\x80\x02]q\x00h\x00a.", "nested more than 32 deep"),
    "memo": (b"\x80\x02Nr\xff\xff\xff\x3f.", "9 bytes and a memo of 1073741823 entries"),
    "text-of-a-gigabyte": (b"\x80\x04\x8d\xff\xff\xff\x3f\0\0\0\0.", "is cut off"),
    "bytes-of-a-gigabyte": (b"\x80\x04\x8e\xff\xff\xff\x3f\0\0\0\0.", "opcode"),
    "bytearray-of-a-gigabyte": (b"\x80\x05\x96\xff\xff\xff\x3f\0\0\0\0.", "opcode"),
    "number-of-a-gigabyte": (b"\x80\x02\x8b\xff\xff\xff\x3f.", "opcode"),
    "frozenset": (pickle.dumps(frozenset([1]), 4), "opcode"),
    "set": (pickle.dumps({1}, 4), "opcode"),
    "bytes": (pickle.dumps(b"x", 4), "opcode"),
    "entry-that-is-not-there": (b"h\x07.", "Memo value not found|opcode or entry"),
}
READ = """
import resource, sys
from hooked_mllm.datasets import load_plain_pickle
from hooked_mllm.errors import InputError

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        load_plain_pickle(path)
    except InputError as error:
        print(error)
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024, "KiB"
"""


def test_what_would_end_the_process_or_fill_memory_is_rejected(tmp_path):
    paths = []
    for name, (data, _) in UNBOUNDED.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(data)
    run = subprocess.run([sys.executable, "-c", READ, *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for line, (name, (_, message)) in zip(run.stdout.splitlines(), UNBOUNDED.items(), strict=True):
        assert re.search(message, line), f"{name}: {line}"


def test_depth_and_size_are_bounded(tmp_path, monkeypatch):
    file, value = tmp_path / "x.p", "x"
    for _ in range(32):
        value = [value]
    file.write_bytes(pickle.dumps(value))
    assert load_plain_pickle(file) == value
    file.write_bytes(pickle.dumps([value]))
    with pytest.raises(InputError, match="nested more than 32 deep"):
        load_plain_pickle(file)
    monkeypatch.setattr("hooked_mllm.datasets.plain_pickle.MAX_BYTES", 10)
    with pytest.raises(InputError, match="has more than 10 bytes"):
        load_plain_pickle(file)
