"""The results of metrics satisfy the Protocols of plots, and other objects are rejected with an error of ours."""

import numpy as np
import pytest

from hooked_mllm.bench import PrefillRecord
from hooked_mllm.errors import InputError
from hooked_mllm.heads import HeadScores
from hooked_mllm.metrics import AblationCurveResult, CausalTable, CoverageCurve, stability
from hooked_mllm.plots import ablation_curves, prefill, protocols, stability_map, table_map

SCORES = HeadScores([[0.9, 0.1], [0.2, 0.3]])
RESULTS = {
    "Scores": SCORES,
    "Curve": AblationCurveResult(ks=(0, 4), per_sample={"top": np.ones((1, 2, 3))}, heads={}),
    "Coverage": CoverageCurve(ks=[1], coverage=[0.5], n_samples=1, share=0.1),
    "Table": CausalTable([[0.1]], places=["visual"]),
    "TaskAgreement": stability({"a": SCORES, "b": SCORES * 2}),
    "TimedVariants": PrefillRecord({}),
}


@pytest.mark.parametrize("name", RESULTS)
def test_each_result_satisfies_its_protocol_and_no_other(name):
    for other, result in RESULTS.items():
        assert isinstance(result, getattr(protocols, name)) is (other == name)


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (ablation_curves, "AblationCurve.run"),
        (stability_map, "metrics.stability"),
        (table_map, "CausalTable"),
        (prefill, "bench_prefill returns"),
    ],
)
@pytest.mark.parametrize("value", [None, 3, SCORES], ids=["none", "number", "scores"])
def test_something_else_is_rejected(plot, message, value):
    with pytest.raises(InputError, match=f"{message}.*got {type(value).__name__}"):
        plot(value)
