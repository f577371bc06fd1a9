"""Records of interventions: plain values, and tables in a notebook."""

import json

import torch

from helpers.intervention_witness import sample
from helpers.wrapped import wrapped
from hooked_mllm import HeadAblation, Steer
from hooked_mllm.interventions.records import Record, Records

FACTS = {"intervention": "Steer", "layer": 3, "norm": 0.5, "note": "a < b & c"}


def test_a_record_is_a_dict():
    record = Record(FACTS)
    assert record == FACTS and json.loads(json.dumps(record)) == FACTS
    assert Records([record]) == [FACTS] and isinstance(Records([record]), list)


def test_every_fact_is_a_row_with_its_text_escaped():
    html = Record(FACTS)._repr_html_()
    assert "Steer" in html and "a &lt; b &amp; c" in html and "a < b" not in html
    assert all(name in html for name in ("layer", "norm", "note")) and "0.5" in html


def test_several_records_are_counted_and_named():
    html = Records([Record(FACTS), Record(intervention="HeadAblation", heads=["L0H1"])])._repr_html_()
    assert "2 interventions" in html and html.count("<table") == 2
    assert html.index("Steer") < html.index("HeadAblation") and "1 interventions" not in Records([{}])._repr_html_()


def test_long_values_are_cut():
    html = Record(intervention="X", heads=[f"L0H{n}" for n in range(1000)])._repr_html_()
    assert len(html) < 4000 and "L0H999" not in html


@torch.no_grad()
def test_an_intervention_that_is_in_use_counts_its_calls():
    model = wrapped("internvl")
    with model.intervene(HeadAblation([(0, 1)], mode="zero", phase="prefill"), Steer(torch.ones(32), 1)) as records:
        assert isinstance(records, Records) and [r["applied"] for r in records] == [{"prefill": 0, "decode": 0}] * 2
        model(sample("internvl"))
        assert all(r["applied"] == {"prefill": 1, "decode": 0} for r in records)
