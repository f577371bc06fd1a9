"""Stability across tasks against eq. 20-21 taken literally."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from hooked_mllm.errors import CacheFileError, HeadError, InputError, NumericsError
from hooked_mllm.heads import HeadScores
from hooked_mllm.metrics import Stability, stability
from hooked_mllm.metrics.stability import KIND
from hooked_mllm.storage import read_json, write_json


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def percentile(values: np.ndarray, p: float) -> float:
    ordered = np.sort(values)
    place = p / 100 * (len(ordered) - 1)
    below = int(np.floor(place))
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@pytest.fixture
def tasks():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(6, 8))
    values = {name: common + noise * rng.normal(size=(6, 8)) for name, noise in (("a", 0.1), ("b", 0.4), ("c", 1.5))}
    values["c"] = values["c"].round(1)  # ties
    return {name: HeadScores(v, name=f"RAM {name}", provenance={"dataset": name}) for name, v in values.items()}


@pytest.mark.parametrize("p", [95, 80, 50.0])
def test_formula(tasks, p):
    found = stability(tasks, p)
    flat = [s.values.numpy().ravel() for s in tasks.values()]
    for i in range(3):
        for j in range(3):
            expected = np.corrcoef(ranks(flat[i]), ranks(flat[j]))[0, 1]
            assert found.spearman[i, j] == pytest.approx(expected, abs=1e-12)
    thresholds = [percentile(v, p) for v in flat]
    assert found.thresholds == pytest.approx(thresholds, abs=1e-12)
    counts = sum((v >= t - 1e-12).astype(int) for v, t in zip(flat, thresholds, strict=True)).reshape(6, 8)
    assert np.array_equal(found.counts.numpy(), counts)
    assert list(found.universal) == [(int(l), int(h)) for l, h in np.argwhere(counts == 3)]
    assert list(found.heads(2)) == [(int(l), int(h)) for l, h in np.argwhere(counts >= 2)]
    assert found.mean_spearman == pytest.approx((found.spearman.sum() - 3) / 6)
    assert set(counts.ravel()) >= {0, 1}  # the case is not a trivial one


def test_layers_not_measured_take_no_part(tasks):
    part = {name: HeadScores(s.values, missing=[2]) for name, s in tasks.items()}
    found = stability(part, 80)
    rest = {name: HeadScores(np.delete(s.values.numpy(), 2, axis=0)) for name, s in tasks.items()}
    expected = stability(rest, 80)
    assert np.array_equal(np.delete(found.counts.numpy(), 2, axis=0), expected.counts) and not found.counts[2].any()
    np.testing.assert_allclose(found.spearman, expected.spearman)


def test_on_disk(tasks, tmp_path):
    found = stability(tasks)
    found.save(tmp_path / "s.json")
    again = Stability.load(tmp_path / "s.json")
    assert again.tasks == found.tasks and again.thresholds == found.thresholds
    assert again.percentile == 95.0 and again.provenance["b"]["provenance"] == {"dataset": "b"}
    assert np.array_equal(again.spearman, found.spearman) and np.array_equal(again.counts, found.counts)
    content = read_json(tmp_path / "s.json", KIND)
    write_json(tmp_path / "s.json", KIND, {**content, "thresholds": [1.0, *content["thresholds"]]})
    with pytest.raises(CacheFileError, match="do not fit its 3 tasks"):
        Stability.load(tmp_path / "s.json")
    del content["counts"]
    write_json(tmp_path / "s.json", KIND, content)
    with pytest.raises(CacheFileError, match="damaged"):
        Stability.load(tmp_path / "s.json")


def test_plot(tasks):
    found = stability(tasks)
    figure = found.plot(title="three tasks")
    assert isinstance(figure, Figure)
    left, right = figure.axes[:2]
    assert [t.get_text() for t in left.texts] == [f"{v:.2f}" for v in found.spearman.ravel()]
    assert [t.get_text() for t in left.get_xticklabels()] == ["a", "b", "c"]
    assert np.array_equal(right.images[0].get_array(), found.counts.numpy())
    assert "top 5 %" in right.get_title()
    figure.canvas.draw()


def test_repr(tasks):
    assert repr(stability(tasks, 90)).startswith("Stability(a, b, c: mean Spearman 0.")


def test_bad_input_is_rejected(tasks):
    with pytest.raises(InputError, match="two tasks at least"):
        stability({"a": tasks["a"]})
    with pytest.raises(InputError, match="from 0 to 100"):
        stability(tasks, 101)
    with pytest.raises(HeadError, match="The scores of 'z' are"):
        stability({**tasks, "z": HeadScores(np.ones((6, 7)))})
    with pytest.raises(HeadError, match=r"without layers \[1\]"):
        stability({**tasks, "z": HeadScores(tasks["a"].values, missing=[1])})
    with pytest.raises(NumericsError, match="are equal"):
        stability({**tasks, "z": HeadScores(np.ones((6, 8)), name="flat")})
    with pytest.raises(InputError, match="from 1 to 3"):
        stability(tasks).heads(4)
