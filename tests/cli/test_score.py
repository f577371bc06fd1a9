import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from helpers.tiny import save_tiny
from hooked_mllm import HeadScores, HookedMLLM, cli
from hooked_mllm.datasets import RefCOCOg
from hooked_mllm.metrics import KeyTokenRatio, RetrievalAttentionMass, VisionMass
from hooked_mllm.toys import VisualRetrieval

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = ROOT / "tests" / "data" / "refcocog"
RETRIEVAL_HEADS = {(2, 4), (2, 5), (2, 6), (2, 7)}  # planted in the toy, see its training.json


@pytest.fixture
def run(tmp_path, capsys):
    """The command line in this process: arguments -> (status, out, err)."""

    def call(*arguments):
        capsys.readouterr()  # what the test wrote before
        status = cli.main(["score", "--quiet", "--out", str(tmp_path / "out"), *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def left_over(folder):
    return {p.name for p in folder.iterdir() if p.name.startswith(".") or p.suffix == ".tmp"}


def test_without_arguments_the_toy_on_its_task(tmp_path):
    """As a user runs it: in a process of its own, in an empty folder, with nothing but defaults."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "hooked_mllm", "score"],
        cwd=tmp_path,
        # the rest of the environment stays: a GPU's driver is found by it
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    out = tmp_path / "hooked-mllm-out"
    assert {p.name for p in out.iterdir()} == {
        "scores.json", "scores.safetensors", "head_map.png", "overlay_0.png", "overlay_1.png", "overlay_2.png"
    }  # fmt: skip
    scores = HeadScores.load(out / "scores.json")
    assert scores == HeadScores.load(out / "scores.safetensors")
    assert set(scores.top(4)) == RETRIEVAL_HEADS
    table = re.findall(r"^ +\d+ +(L\d+H\d+) ", result.stdout, re.MULTILINE)
    assert table == [f"L{layer}H{head}" for layer, head in scores.top(8)]
    assert "measuring heads" in result.stderr and "32/32" in result.stderr
    for picture in out.glob("*.png"):
        with Image.open(picture) as image:
            assert image.format == "PNG" and min(image.size) > 200


def test_toy_scores_are_those_of_the_library(run, tmp_path):
    status, out, _ = run("--samples", 3, "--seed", 5, "--pictures", 0, "--top", 2)
    assert status == 0
    scores = HeadScores.load(tmp_path / "out" / "scores.json")
    model = HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", device="cpu")
    expected = model.measure(VisualRetrieval(seed=5).samples(model, 3), RetrievalAttentionMass(), progress=False)
    torch.testing.assert_close(scores.values, expected.values)
    assert scores.provenance["seed"] == 5 and "VisualRetrieval(seed=5" in scores.provenance["dataset"]
    assert scores.provenance["sample_ids"] == [e.id for e in VisualRetrieval(seed=5).examples(3)]
    assert not list((tmp_path / "out").glob("overlay*")) and left_over(tmp_path / "out") == set()
    assert "   2  L" in out and "   3  L" not in out


def test_refcocog_with_a_checkpoint_of_each_family(run, tmp_path, family):
    """Real photographs; scores against the attention that plain transformers returns under eager."""
    folder = save_tiny(family, tmp_path / "checkpoint")
    data = f"refcocog:{PHOTOGRAPHS}:sample:test"
    status, out, err = run("--model", folder, "--data", data, "--samples", 4, "--top", 3, "--pictures", 2)
    assert (status, err) == (0, "")
    scores = HeadScores.load(tmp_path / "out" / "scores.safetensors")
    model = HookedMLLM.from_pretrained(str(folder), dtype="float32", device="cpu")
    plain = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype="float32").eval()
    total = torch.zeros(scores.shape, dtype=torch.float64)
    records = RefCOCOg(PHOTOGRAPHS, "sample", "test", max_samples=4, seed=0)
    for record in records:
        sample = model.prepare(record.question, images=record.images, target=record.target)
        with torch.no_grad():
            attentions = plain(**sample.inputs, output_attentions=True).attentions
        question, target = sample.layout.mask("question"), sample.layout.target(record.target)
        pattern = torch.stack(attentions)[:, 0].double()  # [layer head query key]
        total += pattern[:, :, question][..., target].sum(-1).mean(-1)
    torch.testing.assert_close(scores.values, total / 4, atol=1e-6, rtol=1e-5)
    assert scores.provenance["sample_ids"] == [r.id for r in records]
    assert scores.provenance["dataset"] == "refcocog sample test" and scores.provenance["family"] == family
    assert (tmp_path / "out" / "overlay_1.png").stat().st_size > 10_000
    assert out.splitlines()[0] == "3 layers x 4 heads, 4 samples of refcocog sample test"


def test_missing_photographs_are_noted_and_the_rest_is_scored(run, tmp_path):
    folder = save_tiny("qwen3_vl", tmp_path / "checkpoint")
    status, out, err = run("--model", folder, "--data", f"refcocog:{PHOTOGRAPHS}:sample:val", "--pictures", 1)
    assert status == 0 and "1 sample of refcocog sample val" in out
    assert err.startswith("hooked-mllm score: note: 9 of 10 expressions left out")


@pytest.mark.parametrize(("metric", "expected"), [("ktr", KeyTokenRatio), ("vision-mass", VisionMass)], ids=str)
def test_other_metrics(run, tmp_path, metric, expected):
    assert run("--metric", metric, "--samples", 2, "--pictures", 0)[0] == 0
    scores = HeadScores.load(tmp_path / "out" / "scores.json")
    assert scores.name == expected.__name__ and 0 < scores.values.max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder", "--data", "toy"], "no/such/folder"),
        (["--model", "somewhere"], "--model somewhere needs --data; expected toy, refcocog:FOLDER"),
        (["--data", "coco:x"], "'coco:x' is not understood"),
        (["--data", "refcocog:"], "is not understood"),
        (["--data", "refcocog:nowhere"], "nowhere is not a folder"),
        (["--data", f"refcocog:{PHOTOGRAPHS}:umd"], "split_by: sample"),
        (["--data", f"refcocog:{PHOTOGRAPHS}:sample:dev"], "no split 'dev'"),
        (["--data", "refcocog:a:b:c:d"], "not FOLDER:SPLIT_BY:SPLIT either"),
    ],
    ids=["model", "no-data", "kind", "no-folder", "folder", "split-by", "split", "parts"],
)
def test_mistakes_end_with_one_line_and_status_2(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("hooked-mllm score: error: ") and message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "whole number from 1 up, got '0'"),
        (["--top", "many"], "whole number from 1 up, got 'many'"),
        (["--pictures", "-1"], "whole number from 0 up, got '-1'"),
        (["--device", "abacus"], "'abacus' is not a torch device"),
        (["--metric", "vibes"], "invalid choice: 'vibes'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
    ids=["samples", "top", "pictures", "device", "metric", "dtype"],
)
def test_arguments_that_do_not_parse(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["score", "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_run_that_is_stopped_leaves_the_old_results(run, tmp_path, monkeypatch):
    assert run("--samples", 1, "--pictures", 1)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(HookedMLLM, "measure", stop)
    status, _, err = run("--samples", 2, "--pictures", 1)
    assert status == 130 and "stopped" in err
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
