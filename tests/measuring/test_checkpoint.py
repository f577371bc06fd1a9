"""A checkpoint of `measure` resumes under the settings that it was made under, and under no others."""

import json
from contextlib import ExitStack, nullcontext

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.cache_witness import hooked, sample
from hooked_mllm import HeadAblation, HookedMLLM, HybridAttention, Steer
from hooked_mllm.errors import CacheFileError
from hooked_mllm.measuring.checkpoint import MeasureCheckpoint, identity_of
from hooked_mllm.metrics import VisionMass

FAMILY = "qwen3_vl"


def samples(n=3):
    return [sample(FAMILY, i) for i in range(n)]


def run(n=3, model=None, **options):
    return (model or hooked(FAMILY)).measure(samples(n), VisionMass(), progress=False, **options)


def hybrid(window=2, heads=("L0H1",)):
    return hooked(FAMILY).attention(HybridAttention(list(heads), sink=1, window=window, implementation="naive"))


def ablated(head="L1H0"):
    return hooked(FAMILY).intervene(HeadAblation([head], mode="zero", phase="prefill"))


def steered(seed):
    direction = torch.randn(hooked(FAMILY).cfg.d_model, generator=torch.Generator().manual_seed(seed))
    return hooked(FAMILY).intervene(Steer(direction / direction.norm(), 1, coefficient=4.0, phase="prefill"))


def hooked_run(name="blocks.0.attn.hook_z"):
    return hooked(FAMILY).hooks([(name, lambda z, hook: z * 0)])


def twice():
    stack, one = ExitStack(), HeadAblation(["L1H0"], mode="scale", factor=0.5, phase="prefill")
    stack.enter_context(hooked(FAMILY).intervene(one, one))
    return stack


def once():
    return hooked(FAMILY).intervene(HeadAblation(["L1H0"], mode="scale", factor=0.5, phase="prefill"))


CASES = {
    "sdpa, hybrid": (nullcontext, hybrid, r"attention_settings"),
    "hybrid, sdpa": (hybrid, nullcontext, r"attention_settings"),
    "another window": (hybrid, lambda: hybrid(3), r"attention_settings"),
    "other heads": (hybrid, lambda: hybrid(heads=("L0H1", "L2H0")), r"attention_settings"),
    "eager": (nullcontext, lambda: hooked(FAMILY).attention("eager"), r'attention \("sdpa" in the file, "eager" now\)'),
    "of the vision tower": (nullcontext, lambda: hooked(FAMILY).attention("eager", "vision"), r"vision_attention"),
    "an ablation": (nullcontext, ablated, r"interventions"),
    "an ablation before": (ablated, nullcontext, r"interventions"),
    "another head": (ablated, lambda: ablated("L1H1"), r"interventions"),
    # nothing in its description distinguishes it
    "another direction of the same length": (lambda: steered(0), lambda: steered(1), r"interventions"),
    "twice the same": (once, twice, r"interventions"),
    "a hook": (nullcontext, hooked_run, r'hooks \(\[\] in the file, \["blocks.0.attn.hook_z"\] now\)'),
    "a hook elsewhere": (hooked_run, lambda: hooked_run("blocks.1.attn.hook_z"), r"hooks"),
}


@pytest.mark.parametrize("case", CASES)
def test_other_settings_are_rejected_and_the_same_resume(case, tmp_path):
    first, second, differs = CASES[case]
    path = tmp_path / "state"
    with first():
        expected = run()
        run(2, checkpoint=path)
    before = path.read_bytes()
    with second(), pytest.raises(CacheFileError, match=rf"another run: it differs in {differs}.*Use another file"):
        run(checkpoint=path)
    assert path.read_bytes() == before
    with first():
        resumed = run(checkpoint=path)
    assert torch.equal(resumed.values, expected.values) and resumed.provenance == expected.provenance


def test_another_dtype_is_rejected(tmp_path):
    run(2, checkpoint=tmp_path / "state")
    with pytest.raises(CacheFileError, match=r'dtype \("float32" in the file, "bfloat16" now\)'):
        run(model=hooked(FAMILY, dtype=torch.bfloat16), checkpoint=tmp_path / "state")


def test_another_name_revision_or_weights_are_rejected(tmp_path):
    model, path = hooked(FAMILY), tmp_path / "state"
    run(2, checkpoint=path)
    named = {"name": "another/model"}, {"name": model.name, "revision": "v2"}
    for described, differs in zip(named, ("model", "revision"), strict=True):
        other = HookedMLLM(model.hf_model, model.processor, check=False, **described)
        with pytest.raises(CacheFileError, match=rf"differs in {differs} \("):
            run(model=other, checkpoint=path)
    weight = model.hf_model.get_parameter("lm_head.weight")
    kept = weight.detach().clone()
    weight.data += 1
    try:
        with pytest.raises(CacheFileError, match=r"differs in weights \("):
            run(checkpoint=path)
    finally:
        weight.data.copy_(kept)
    run(checkpoint=path)


def test_hooks_that_only_read_do_not_matter(tmp_path):
    run(2, checkpoint=tmp_path / "state")
    registry = hooked(FAMILY).registry
    watching = registry.attach("blocks.0.attn.hook_z", lambda z, hook: None, reads_only=True)
    try:
        run(checkpoint=tmp_path / "state")
    finally:
        registry.detach(watching)


def test_a_file_of_an_older_version_is_rejected(tmp_path):
    path = tmp_path / "state"
    run(2, checkpoint=path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["hooked_mllm"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    del header["identity"]
    save_file(tensors, path, metadata={"hooked_mllm": json.dumps({**header, "format": "hooked_mllm.measure/2"})})
    with pytest.raises(CacheFileError, match="measure/2'; expected 'hooked_mllm.measure/3'.*use another file"):
        run(checkpoint=path)
    save_file(tensors, path, metadata={"hooked_mllm": json.dumps(header)})
    with pytest.raises(CacheFileError, match="does not match the digest"):
        run(checkpoint=path)
    del header["digest"]  # as before there were digests
    save_file(tensors, path, metadata={"hooked_mllm": json.dumps(header)})
    with (
        pytest.raises(CacheFileError, match="damaged: the field 'identity' is missing"),
        pytest.warns(UserWarning, match="no digest"),
    ):
        run(checkpoint=path)


class Policy:
    """Dense heads by a rule; its own text holds an address."""

    def choose(self, q, k, mask, scale, layer):
        return (layer,)

    def validate(self, n_layers, n_heads):
        pass

    def describe(self):
        return {"policy": "the diagonal"}


def test_a_policy_is_compared_by_its_settings():
    described = []
    for _ in range(2):
        with hooked(FAMILY).attention(HybridAttention(Policy(), sink=1, window=2, implementation="naive")):
            described.append(identity_of(hooked(FAMILY)))
    assert described[0] == described[1] and "0x" not in json.dumps(described)
    assert described[0]["attention_settings"]["dense"] == {"policy": "the diagonal"}


def test_an_interrupt_between_a_sample_and_its_states_saves_whole_samples(tmp_path, monkeypatch):
    path, keep = tmp_path / "state", MeasureCheckpoint._keep_states

    def interrupted(state):
        if len(state.done) == 2:
            raise KeyboardInterrupt
        keep(state)

    with monkeypatch.context() as patch:
        patch.setattr(MeasureCheckpoint, "_keep_states", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(3, checkpoint=path)
    assert torch.equal(run(3, checkpoint=path).values, run(3).values)
