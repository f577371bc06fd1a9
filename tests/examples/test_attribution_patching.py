"""The tables of attribution against patching: what is printed is what the metrics give."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from helpers.example_script import import_example
from hooked_mllm import HookedMLLM, corruptions, metrics, objectives


@pytest.fixture
def example():
    return import_example("attribution_patching")


def test_its_tables(example, tmp_path, capsys, monkeypatch):
    shown = ("toy-internvl", "mean of the target", "noising")
    for name, value in {"TOYS": shown[:1], "POINTS": (None,), "STREAM_POINTS": (2,), "SHOWN": shown}.items():
        monkeypatch.setattr(example, name, value)
    example.main(tmp_path, 2)
    found = json.loads((tmp_path / "attribution_patching.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    assert len(found["rows"]) == 4 and len(found["stream"]) == 2 and len(lines) == 2 + 4 + 1 + 2 + 2
    assert len({line.count("|") for line in lines[:6]}) == len({line.count("|") for line in lines[7:]}) == 1
    assert (tmp_path / "attribution_patching.png").stat().st_size > 1000

    model = HookedMLLM.from_pretrained(shown[0], dtype="float32")
    pairs = [(s, corruptions.MeanRegion()(model, s)) for s in example.TASK.samples(model, 2, answer=True)]
    how = {"objective": objectives.LogitDifference(wrong=example.TASK.answers), "progress": False}
    real = metrics.PatchingEffect("z", direction="noising").run(model, pairs, **how).values.flatten()
    estimate = metrics.AttributionPatching("z", direction="noising").run(model, pairs, **how).values.flatten()
    row = found["rows"]["/".join(shown)]["estimates"]["none"]
    rank, linear = spearmanr(estimate, real).statistic, np.corrcoef(estimate, real)[0, 1]
    assert (row["spearman"], row["pearson"]) == pytest.approx((rank, linear), abs=1e-6)
    assert f"| {rank:.2f} / {linear:.2f} / " in lines[3]
