import json
import re

import pytest
import torch
from PIL import Image

from hooked_mllm import HeadScores, cli
from hooked_mllm.bench import PrefillRecord, prefill
from hooked_mllm.errors import NumericsError

TINY = ("--config", "tiny", "--sink", 4, "--window", 16, "--runs", 2, "--warm-up", 1)


@pytest.fixture
def run(tmp_path, capsys):
    """`hooked-mllm bench` in this process: arguments -> (status, out, err)."""

    def call(kind, *arguments):
        capsys.readouterr()
        quiet = ["--quiet"] if kind == "prefill" else []
        status = cli.main(["bench", kind, "--device", "cpu", *quiet, "--out", str(tmp_path), *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def test_prefill_from_end_to_end(run, tmp_path):
    status, out, err = run("prefill", *TINY, "--contexts", "1k", 40, "--dense", 3, 0)
    assert (status, err) == (0, "")
    record = PrefillRecord.load(tmp_path / "prefill.json")
    assert record.contexts == [40, 1024]
    assert list(record.titles) == ["sdpa", "hybrid-0", "hybrid-3", "removed"]
    assert all(len(cell.ms) == 2 for cell in record.cells) and len(record.cells) == 8
    assert record.settings["model"] == "tiny, random weights" and record.settings["dense_heads"] == "random"
    (session,) = record.sessions
    assert session["torch"] == torch.__version__ and session["devices"]
    with Image.open(tmp_path / "prefill.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    rows = re.findall(r"^hybrid, 3 dense +([\d.]+) +[\d.]+ +([\d.]+) +([\d.]+) ", out, re.MULTILINE)
    assert len(rows) == 2
    for (mean, ratio, ceiling), context in zip(rows, record.contexts, strict=True):
        cell, sdpa, removed = (record.cell(context, v) for v in ("hybrid-3", "sdpa", "removed"))
        assert float(mean) == pytest.approx(cell.mean, abs=0.051)
        assert float(ratio) == pytest.approx(sdpa.mean / cell.mean, abs=0.0051)
        assert float(ceiling) == pytest.approx(sdpa.mean / removed.mean, abs=0.0051)


def test_a_checkpoint_with_its_own_scores_then_resumed(run, tmp_path):
    """The bundled toy, dense heads from a score file; what is there is left out the second time."""
    values = torch.zeros(6, 8)
    values[2, 4:] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    HeadScores(values, name="RAM").save(tmp_path / "scores")
    common = ("--model", "toy-qwen3-vl", "--heads", tmp_path / "scores.json", "--runs", 1, "--warm-up", 1, "--dense", 2)
    status, _, err = run("prefill", *common, "--contexts", 40, "--backends", "sdpa", "hybrid")
    assert (status, err) == (0, "")
    first = PrefillRecord.load(tmp_path / "prefill.json")
    assert first.settings["heads"] == {"2": ["L2H4", "L2H5"]} and first.settings["n_layers"] == 6
    status, _, err = run("prefill", *common, "--contexts", 40)
    assert status == 2 and "--resume continues it" in err
    status, _, _ = run("prefill", *common, "--contexts", 40, 64, "--backends", "sdpa", "hybrid", "--resume")
    both = PrefillRecord.load(tmp_path / "prefill.json")
    assert status == 0 and both.cells[:2] == first.cells and both.contexts == [40, 64]


NOTE = "On a CPU, hybrid is its torch definition: its times are not those of the kernel."


def test_on_a_cpu_the_note_states_what_was_timed(run):
    """Above the tables, as soon as there is something hybrid in them."""
    for backend, first in (("sdpa", "tiny, random weights: "), ("hybrid", NOTE), ("sdpa", NOTE)):
        status, out, _ = run("prefill", *TINY, "--contexts", 40, "--dense", 3, "--backends", backend, "--resume")
        assert status == 0 and out.startswith(first) and out.count(NOTE) == (first == NOTE)


@pytest.mark.parametrize(
    ("backends", "rejected"),
    [
        (["sdpa", "flash"], "--backends flash needs"),
        (["cudnn"], "--backends cudnn needs"),
        (["hybrid", "cudnn-compiled", "flash"], "--backends cudnn-compiled flash need"),
    ],
    ids=["flash", "cudnn", "compiled"],
)
def test_what_needs_a_gpu_is_rejected_on_a_cpu(run, tmp_path, backends, rejected):
    status, out, err = run("prefill", *TINY, "--contexts", 40, "--dense", 3, "--backends", *backends)
    rest = "sdpa, eager, hybrid, removed, sdpa-compiled, hybrid-compiled, removed-compiled"
    assert (status, out) == (2, "") and not [*tmp_path.iterdir()]
    assert err == f"hooked-mllm bench prefill: error: {rejected} a GPU; on a CPU: {rest}.\n"


def test_stopped_between_lengths_then_resumed(run, tmp_path, monkeypatch):
    whole, path = prefill._length, tmp_path / "prefill.json"
    lengths = ("--contexts", 40, 64, 96, "--dense", 3, "--backends", "sdpa", "hybrid")

    def until(last):
        def timed(model, variants, context, *rest):
            if context > last:
                raise KeyboardInterrupt
            return whole(model, variants, context, *rest)

        return timed

    monkeypatch.setattr(prefill, "_length", until(0))
    status, out, err = run("prefill", *TINY, *lengths)
    assert (status, out) == (130, "") and f"None of 3 lengths was finished: there is no {path}." in err
    for last, done, more in ((40, 1, []), (64, 2, ["--resume"])):
        monkeypatch.setattr(prefill, "_length", until(last))
        status, out, err = run("prefill", *TINY, *lengths, *more)
        assert (status, out) == (130, "") and err.endswith("stopped\n")
        assert f"{done} of 3 lengths are in {path}: the same command with --resume continues." in err.splitlines()
    monkeypatch.setattr(prefill, "_length", whole)
    assert run("prefill", *TINY, *lengths, "--resume")[0] == 0
    assert PrefillRecord.load(path).contexts == [40, 64, 96]


def test_wrong_outputs_end_with_one_line(run, tmp_path, monkeypatch):
    def fail(*_):
        raise NumericsError("hybrid differs, so nothing is timed")

    monkeypatch.setattr(prefill, "check_variants", fail)
    status, out, err = run("prefill", *TINY, "--contexts", 40)
    assert (status, out) == (2, "") and not (tmp_path / "prefill.json").exists()
    assert err == "hooked-mllm bench prefill: error: hybrid differs, so nothing is timed\n"


def test_kernel(run, tmp_path):
    small = ("--heads", 4, "--kv-heads", 2, "--d-head", 16, "--dense", 1, "--sink", 4, "--window", 16)
    status, out, err = run("kernel", *small, "--tokens", 64, "--rounds", 2)
    assert (status, err) == (0, "")
    found = json.loads((tmp_path / "kernel.json").read_text())
    assert len(found["settings"]["dense"]) == 1 and found["lengths"]["64"]["hybrid, 1 dense"]["ms"]
    assert out.splitlines()[0] == f"{NOTE} FlexAttention is left out."
    assert "64 tokens" in out and "relative error against float64, 1 dense, 77 tokens" in out
    _, out, _ = run("kernel", *small, "--tokens", 64, "--rounds", 1, "--skip-flex")
    assert out.splitlines()[0] == NOTE
    status, _, err = run("kernel", *small, "--dense", 9, "--tokens", 64)
    assert (
        status == 2
        and err.startswith("hooked-mllm bench kernel: error: Expected no more dense heads than heads")
        and "9 dense of 4" in err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dense", 13], "Numbers of dense heads are 0 to 12"),
        (["--heads", "nowhere.json"], "nowhere.json cannot be read"),
        (["--device-map", "auto"], "Give --device or --device-map, not both"),
    ],
    ids=["dense", "heads", "device-map"],
)
def test_mistakes_end_with_one_line_and_status_2(run, arguments, message):
    status, out, err = run("prefill", *TINY, "--contexts", 40, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("hooked-mllm bench prefill: error: ") and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "8m"], "a number of tokens such as 8192 or 8k, got '8m'"),
        (["--contexts", "0"], "got '0'"),
        (["--backends", "cudn"], "invalid choice: 'cudn'"),
        (["--model", "toy-qwen3-vl"], "not allowed with argument"),
        (["--runs", "0"], "whole number from 1 up"),
    ],
    ids=["unit", "none", "backend", "both", "runs"],
)
def test_arguments_that_do_not_parse(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run("prefill", *TINY, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
