"""What a notebook shows of the package's objects: valid, escaped, small HTML, also of empty things."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.html import Page
from hooked_mllm import ActivationCache, GenerationCache, HeadAblation, HeadScores, HeadSet, HookedMLLM, SampleBatch
from hooked_mllm.interventions.records import Record, Records
from hooked_mllm.metrics import AblationCurveResult, CausalTable, stability

HOSTILE = "<script>alert(1)</script>"
LIMIT = 30_000  # bytes, for a model of 36 layers x 32 heads
SHAPE = {"n_layers": 36, "n_heads": 32}


@pytest.fixture(scope="module")
def model():
    return HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def sample(model):
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    images = [Image.fromarray(noise)] * 3
    return model.prepare("what color is the star ? <b>", images=images, answer="red", id=HOSTILE)


def shown(thing):
    """The page of an object, which must be small and escaped."""
    html = thing._repr_html_()
    page = Page(html)
    assert len(html.encode()) < LIMIT and "script" not in page.tags and html.count("<style>") == 1
    assert "prefers-color-scheme:dark" in html and "--jp-" in html
    return page


def scores(name="scores", **options):
    return HeadScores(np.random.default_rng(1).standard_normal((36, 32)), name=name, **options)


def test_sample_and_batch(sample):
    page = shown(sample)
    assert f"Sample {HOSTILE}: {len(sample)} tokens" in page.texts
    assert {"what color is the star ? <b>", "red", "image 2", "input_ids", f"[1, {len(sample)}]"} <= set(page.texts)
    assert 1 <= page.tags.count("img") <= 3
    batch = shown(SampleBatch.collate([sample] * 60))
    assert batch.texts.count(HOSTILE) == 50 and "the first 50 are shown" in batch.texts


def test_layout_shows_what_describe_prints(sample):
    texts = shown(sample.layout).texts
    words = {line.split("  ")[0] for line in sample.layout.describe().splitlines()}
    assert words <= set(texts) and "last" in words and str(sample.layout.last_index) in texts


def test_caches(model, sample):
    _, cache = model.run_with_cache(sample)
    page = shown(cache)
    assert page.texts[0] == repr(cache).splitlines()[0]
    assert "blocks.*.attn.hook_z" in page.texts and "blocks 0-5" in page.texts
    _, generated = model.run_with_cache(sample, generate={"max_new_tokens": 2})
    assert isinstance(generated, GenerationCache)
    assert shown(generated).texts[0] == repr(generated).splitlines()[0]


def test_every_hook_point_of_a_large_model_fits():
    from hooked_mllm.hooks.table import specs

    entries = {
        spec.name(tower, layer): torch.zeros(1)
        for tower in ("vision", "text", "projector")
        for spec in specs(tower)
        for layer in (range(36) if spec.in_block else [None])
    }
    assert len(entries) > 1000
    assert "blocks 0-35" in shown(ActivationCache(entries, {"text": 36, "vision": 36})).texts


def test_head_scores():
    page = shown(scores(HOSTILE, missing=[0, 1, 2, 7]))
    assert f"HeadScores: {HOSTILE}, 36 layers x 32 heads" in page.texts
    assert "layers not measured: 0-2, 7" in page.texts and page.tags.count("img") == 1
    best = scores(missing=[0, 1, 2, 7]).ranking[0]
    assert page.texts[page.texts.index("score") + 2] == f"L{best[0]}H{best[1]}"
    small = shown(HeadScores([[0.25, 1.0]], name="small"))
    assert {"H0", "H1", "L0", "0.25", "1.00"} <= set(small.texts)


def test_head_set():
    texts = shown(HeadSet(["L20H15", "L3H2", "L20H1"], **SHAPE)).texts
    assert texts[1:] == ["layer 3", "L3H2", "layer 20", "L20H1, L20H15"]
    assert "L35H31" in shown(HeadSet.from_mask(torch.ones(36, 32, dtype=torch.bool))).texts[-1]


def test_tables_of_metrics():
    rng = np.random.default_rng(2)
    table = shown(CausalTable([[0.1, 0.9]], places=[HOSTILE, "question"], name=HOSTILE))
    assert table.texts[1:] == [HOSTILE, "question", "L0", "0.10", "0.90"]
    assert shown(CausalTable(rng.standard_normal((36, 3000)), places=range(3000))).tags.count("img") == 1
    values = {"top": rng.random((1, 2, 5)), "random": np.full((3, 2, 5), np.nan)}
    curve = AblationCurveResult(ks=(0, 4), per_sample=values, heads={}, objective=HOSTILE)
    assert shown(curve).texts[1:4] == ["heads", "top", "random"] and "-" in shown(curve).texts
    alike = shown(stability({HOSTILE: scores(), "other": scores()}))
    assert alike.texts.count(HOSTILE) == 2 and "1.00" in alike.texts


def test_records_are_plain_lists_and_dicts(model, sample):
    with model.intervene(HeadAblation(["L2H4"], mode="zero", phase="prefill")) as records:
        model(sample)
    expected = {
        **HeadAblation(["L2H4"], mode="zero", phase="prefill").describe(),
        "applied": {"prefill": 1, "decode": 0},
    }
    assert isinstance(records, list) and isinstance(records[0], dict)
    assert records == [expected] and records[0] == expected and repr(records) == repr([expected])
    assert json.loads(json.dumps(records)) == json.loads(json.dumps([expected]))
    assert {"1 intervention", "HeadAblation", '["L2H4"]', '{"prefill": 1, "decode": 0}'} <= set(shown(records).texts)
    assert shown(records[0]).texts[0] == "HeadAblation"
    assert shown(Record(intervention=HOSTILE, heads=HOSTILE)).texts == [HOSTILE, "heads", HOSTILE]


def test_empty_things():
    assert shown(HeadSet([], **SHAPE)).texts == ["HeadSet: 0 heads of 36 layers x 32 heads"]
    assert shown(ActivationCache({}, {"text": 1})).texts == ["ActivationCache: 0 activations, 0 B"]
    assert repr(ActivationCache({}, {"text": 1})) == "ActivationCache: 0 activations, 0 B"
    assert shown(Records()).texts == ["0 interventions"] and shown(Record()).texts == ["Record"]
    assert "–" in shown(HeadScores([[0.0], [0.0]], missing=[0])).texts
    assert "0.00" in shown(HeadScores([[0.0, 0.0]])).texts
