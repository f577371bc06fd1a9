"""What metrics of many runs share: a checkpoint that cannot be written is reported before any sample is prepared."""

import pytest
import torch

from helpers.wrapped import wrapped
from hooked_mllm import HeadScores
from hooked_mllm.errors import CacheFileError
from hooked_mllm.metrics import (
    AblationCurve,
    AblationEffect,
    AttributionPatching,
    DuoGate,
    PatchingEffect,
    PathPatching,
)
from hooked_mllm.objectives import AnswerLogProb

OBJECTIVE = {"objective": AnswerLogProb()}
METRICS = {
    "AblationCurve": (AblationCurve(HeadScores(torch.rand(3, 4)), ks=[0, 2]), OBJECTIVE),
    "AblationEffect": (AblationEffect(mode="zero", phase="prefill"), OBJECTIVE),
    "PatchingEffect": (PatchingEffect(), OBJECTIVE),
    "AttributionPatching": (AttributionPatching(), OBJECTIVE),
    "PathPatching": (PathPatching("logits"), OBJECTIVE),
    "DuoGate": (DuoGate(steps=1), {}),
}


@pytest.mark.parametrize("name", METRICS)
def test_the_checkpoint_can_be_written_or_no_sample_is_prepared(tmp_path, name):
    def samples():
        pytest.fail("a sample was prepared")
        yield

    metric, options = METRICS[name]
    (tmp_path / "file").write_text("kept")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "state", "a part of the path is a file")):
        with pytest.raises(CacheFileError, match=f"cannot be written: .*{message}"):
            metric.run(wrapped("qwen3_vl"), samples(), checkpoint=path, progress=False, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
