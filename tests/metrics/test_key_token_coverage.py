"""Key Token Coverage against the union of eq. 24-25 taken literally, for every k."""

import numpy as np
import pytest
import torch

from helpers.attention_reference import Layers, random_layers
from hooked_mllm.errors import CacheFileError, HeadError, InputError
from hooked_mllm.heads import HeadScores, HeadSet
from hooked_mllm.metrics import CoverageCurve, KeyTokenCoverage, KeyTokenRatio, RetrievalAttentionMass
from hooked_mllm.storage import write_json

LENGTHS = (23, 17, 20, 23)


def literal_coverage(layers: Layers, ranking, share: float) -> np.ndarray:
    """[k] for k = 0 .. n: the union over the first k heads, sample by sample, then the mean."""
    curve = np.zeros(len(ranking) + 1)
    n_samples = len(layers.masks["padding"])
    for b in range(n_samples):
        real = np.flatnonzero(~layers.masks["padding"][b].numpy())
        target = set(np.flatnonzero(layers.masks["target"][b].numpy()))
        profile = layers.profile("question")[:, b]
        union: set[int] = set()
        for place, (layer, head) in enumerate(ranking, start=1):
            order = real[np.argsort(-profile[layer, head, real].round(12), kind="stable")]
            union |= set(order[: int(np.ceil(round(share * len(real), 9)))]) & target
            curve[place] += len(union) / len(target) / n_samples
    return curve


def ranking_of(layers: Layers) -> HeadScores:
    metric = RetrievalAttentionMass()
    metric.update(view=layers.view())
    return metric.compute()


def fed(metric: KeyTokenCoverage, layers: Layers, group: int) -> KeyTokenCoverage:
    for start in range(0, layers.n_layers, group):
        metric.update(view=layers.view(range(start, min(start + group, layers.n_layers))))
    return metric


@pytest.mark.parametrize("share", [0.05, 0.15])
@pytest.mark.parametrize("group", [1, 2, 5])
def test_one_pass_gives_the_union_for_every_k(share, group):
    layers = random_layers(lengths=LENGTHS, n_layers=5, window=9)
    scores = ranking_of(layers)
    curve = fed(KeyTokenCoverage(scores, share=share), layers, group).compute()
    reference = literal_coverage(layers, scores.ranking, share)
    assert curve.ks == list(range(1, 21)) and curve.n_samples == 4
    np.testing.assert_allclose(curve.coverage, reference[1:], atol=1e-12)
    assert reference[1] < reference[-1]  # it rises: the union matters


def test_a_head_set_in_its_own_order_and_chosen_ks():
    layers = random_layers(lengths=LENGTHS)
    heads = HeadSet(["L2H1", "L0H3", "L0H0", "L1H2", "L2H2"], n_layers=3, n_heads=4)
    reference = literal_coverage(layers, list(heads), 0.15)
    curve = fed(KeyTokenCoverage(heads, ks=[0, 2, 5], share=0.15), layers, 1).compute()
    np.testing.assert_allclose(curve.coverage, reference[[0, 2, 5]], atol=1e-12)
    assert curve.at(5) == curve.coverage[2] and curve.at(0) == 0.0
    with pytest.raises(HeadError, match="top 3 heads was not computed"):
        curve.at(3)


def test_of_one_head_the_coverage_is_its_ratio():
    layers = random_layers(lengths=LENGTHS)
    ratio = KeyTokenRatio(share=0.15)
    ratio.update(view=layers.view())
    for head in [(0, 0), (1, 3), (2, 2)]:
        metric = KeyTokenCoverage(HeadSet([head], n_layers=3, n_heads=4), share=0.15)
        assert fed(metric, layers, 3).compute().coverage == [pytest.approx(ratio.compute()[head])]


def test_samples_apart_merged_resumed_and_cast_give_the_same_curve():
    layers = random_layers(lengths=LENGTHS)
    scores = ranking_of(layers)
    reference = fed(KeyTokenCoverage(scores, share=0.15), layers, 3).compute().coverage
    shards = [KeyTokenCoverage(scores, share=0.15) for _ in range(2)]
    for b in range(4):
        shards[b % 2].to(torch.float16).update(view=layers.view(samples=slice(b, b + 1)))
    resumed = KeyTokenCoverage(scores, share=0.15)
    resumed.load_state_dict(shards[0].state_dict())
    resumed.merge_state(shards[1])
    np.testing.assert_allclose(resumed.compute().coverage, reference, atol=1e-12)
    with pytest.raises(ValueError, match="same settings"):
        shards[0].merge_state(KeyTokenCoverage(scores, share=0.2))


def test_numbers_of_heads_are_numbers_or_shares():
    heads = HeadSet([(0, 0), (1, 3), (2, 2), (2, 1)], n_layers=3, n_heads=4)
    assert KeyTokenCoverage(heads, ks=[1, 0.5, np.float32(0.75), 1.0]).ks == [1, 2, 3, 4]
    for wrong in ([2.5], [5], [-1], [float("nan")], []):
        with pytest.raises(HeadError, match=r"ranked heads|one or more k"):
            KeyTokenCoverage(heads, ks=wrong)


def test_the_curve_on_disk(tmp_path):
    curve = CoverageCurve([1, 5], [0.1, 1 / 3], n_samples=7, share=0.05, provenance={"metric": "KeyTokenCoverage"})
    curve.save(tmp_path / "curve.json")
    assert CoverageCurve.load(tmp_path / "curve.json") == curve
    (tmp_path / "cut.json").write_text((tmp_path / "curve.json").read_text()[:-9])
    HeadScores([[1.0]]).save(tmp_path / "scores")
    write_json(tmp_path / "fields.json", "hooked_mllm.CoverageCurve", {"ks": [1]})
    for name, message in (("cut", "damaged"), ("scores", "expected a hooked_mllm.CoverageCurve"), ("fields", "fields")):
        with pytest.raises(CacheFileError, match=message):
            CoverageCurve.load(tmp_path / f"{name}.json")


def test_plot_draws_the_curve():
    curve = CoverageCurve([1, 5], [0.1, 0.4], n_samples=7, share=0.05)
    (line,) = curve.plot().axes[0].lines
    assert line.get_xdata().tolist() == [1, 5] and line.get_ydata().tolist() == [0.1, 0.4]


def test_misuse_is_rejected():
    layers = random_layers()
    some = HeadSet([(0, 1)], n_layers=3, n_heads=4)
    with pytest.raises(HeadError, match="ranking is empty"):
        KeyTokenCoverage(HeadSet(n_layers=3, n_heads=4))
    with pytest.raises(HeadError, match="from 0 to 1"):
        KeyTokenCoverage(some, ks=[1, 2])
    with pytest.raises(InputError, match="share"):
        KeyTokenCoverage(some, share=1.5)
    with pytest.raises(HeadError, match="36 x 32"):
        KeyTokenCoverage(HeadSet([(0, 1)], n_layers=36, n_heads=32)).update(view=layers.view())
    metric = KeyTokenCoverage(some)
    with pytest.raises(InputError, match="seen no sample"):
        metric.compute()
    assert repr(metric) == "KeyTokenCoverage(HeadSet(1 of 3 x 4: L0H1), share=0.05, queries='question')"


def test_the_table_of_a_notebook_has_every_k():
    html = CoverageCurve(ks=[1, 2], coverage=[0.25, 0.5], n_samples=4, share=0.05)._repr_html_()
    assert "CoverageCurve: 4 samples, share 0.05" in html
    assert html.count("<tr>") == 3 and "0.250" in html and "0.500" in html


def test_heads_as_text_are_measured_as_the_set_of_them():
    layers = random_layers()
    ranking = ranking_of(layers)
    shape = {"n_layers": ranking.n_layers, "n_heads": ranking.n_heads}
    curves = []
    for heads in ("L1H2, L0H0, L2H1", HeadSet.parse("L1H2, L0H0, L2H1", **shape)):
        metric = KeyTokenCoverage(heads, share=0.2)
        metric.update(view=layers.view())
        curves.append(metric.compute().coverage)
    assert curves[0] == curves[1]
    with pytest.raises(HeadError, match="Head 9 of L0H9"):
        KeyTokenCoverage("L0H9").update(view=layers.view())
