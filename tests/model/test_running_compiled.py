"""Compiled models, in every way of compiling them: hooks, caches and backends act as in the plain model."""

import sys
import threading

import pytest
import torch

from helpers.tiny import tiny_image, tiny_processor
from helpers.wrapped import fresh, model_inputs, plain, wrapped
from hooked_mllm import HeadAblation, HookedMLLM
from hooked_mllm.errors import HookValueError
from hooked_mllm.metrics import AblationEffect, VisionMass
from hooked_mllm.wiring.compiled import UNCOMPILED

NAMES = (
    "hook_embed",
    "vision.blocks.0.attn.hook_z",
    "projector.hook_out",
    "blocks.0.hook_resid_post",
    "blocks.1.attn.hook_pattern",
    "blocks.1.attn.hook_z",
    "ln_final.hook_normalized",
    "hook_logits",
)


def blocks(hf_model):
    return hf_model.model.language_model.layers


def compile_module(hf_model):
    hf_model.compile(backend="eager")


def compile_blocks(hf_model):
    for block in blocks(hf_model):
        block.compile(backend="eager")


def compile_forward(hf_model):
    hf_model.forward = torch.compile(hf_model.forward, backend="eager")


def replace_blocks(hf_model):
    layers = blocks(hf_model)
    for k, block in enumerate(layers):
        layers[k] = torch.compile(block, backend="eager")


def replace_head(hf_model):
    hf_model.lm_head = torch.compile(hf_model.lm_head, backend="eager")


#: ways to compile a model, and whether before or after it is wrapped
WAYS = [
    (compile_module, True),
    (compile_blocks, False),
    (compile_blocks, True),
    (compile_forward, True),
    (replace_blocks, False),
    (replace_blocks, True),
    (replace_head, False),
]


@pytest.fixture(autouse=True)
def no_compiled_code():
    yield
    torch.compiler.reset()


def zero(x, hook):
    return x * 0


def last_logits(logits):
    return logits[:, -1].logsumexp(-1)


def check_as_plain(model, family):
    """Edits, caches and a generation of `model` are those of a model that is not compiled."""
    inputs, reference = model_inputs(family), wrapped(family)
    for name in NAMES:
        edited = [m.run_with_hooks(inputs, fwd_hooks=[(name, zero)]) for m in (model, reference)]
        cached = [m.run_with_cache(inputs, name)[1][name] for m in (model, reference)]
        assert torch.equal(*edited) and torch.equal(*cached), name
    ablation, tokens, records = HeadAblation([(0, 0)], mode="zero", phase="both"), [], []
    for m in (model, reference):
        with m.intervene(ablation) as record:
            tokens.append(m.generate(inputs, max_new_tokens=3, do_sample=False))
        records.append(record[0]["applied"])
    assert torch.equal(*tokens) and records[0] == records[1]
    assert torch.equal(model(inputs), plain(family)(**inputs).logits)


@pytest.mark.parametrize(("way", "after_wrapping"), WAYS)
def test_hooks_act_in_models_compiled_in_any_way(way, after_wrapping):
    name = "qwen3_vl"
    hf_model = fresh(name)
    model = HookedMLLM.from_model(hf_model, check=False) if after_wrapping else None
    way(hf_model)
    if model is None:
        hf_model(**model_inputs(name))  # the check at wrapping comes after a compiled run
        model = HookedMLLM.from_model(hf_model, tiny_processor(name))
    model(model_inputs(name))
    check_as_plain(model, name)


def test_a_model_inside_of_torch_compile_is_wrapped(family):
    hf_model = fresh(family)
    model = HookedMLLM.from_model(torch.compile(hf_model, backend="eager"), tiny_processor(family))
    assert model.hf_model is hf_model
    check_as_plain(model, family)


@pytest.mark.parametrize("way", [compile_blocks, compile_module])
def test_sweeps_and_runs_that_stop_at_a_block_are_those_of_the_plain_model(way):
    models = [HookedMLLM.from_model(fresh("qwen3_vl"), check=False) for _ in range(2)]
    inputs, effect = model_inputs("qwen3_vl"), AblationEffect(mode="zero", phase="prefill", layers=[1])
    way(models[1].hf_model)
    models[1](inputs)
    scores = [effect.run(m, [inputs], objective=last_logits, progress=False).values for m in models]
    assert torch.equal(*(values.nan_to_num(-1) for values in scores)) and float(scores[0][1].abs().max()) > 0.01
    assert torch.equal(*(m(inputs, stop_at_layer=2) for m in models))


def test_hooked_runs_of_two_threads_leave_compiled_code_off_until_the_last_has_ended():
    entered, leave = threading.Event(), threading.Event()

    def stance():
        return sys.modules["torch._dynamo.eval_frame"]._stance.stance

    def other():
        with UNCOMPILED:
            entered.set()
            leave.wait()

    before, thread = stance(), threading.Thread(target=other)
    with UNCOMPILED:
        thread.start()
        entered.wait()
        assert stance() == "force_eager"
    assert stance() == "force_eager"
    leave.set()
    thread.join()
    assert stance() == before


def test_a_tap_or_backend_that_the_run_misses_raises(family):
    model = HookedMLLM.from_model(fresh(family), tiny_processor(family), check=False)
    inputs = model.prepare("Where is the mug?", images=tiny_image())
    attention = blocks(model.hf_model)[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with pytest.raises(HookValueError, match=r"did not call the hooks on blocks\.1\.attn,"):
        model.run_with_cache(inputs, "blocks.1.attn.hook_pattern")
    with pytest.raises(HookValueError, match=r"did not call the hooks on blocks\.1\.attn,"):
        model.measure([inputs], VisionMass(), progress=False)
    with pytest.raises(HookValueError, match=r"did not call the hooks on blocks\.1\.attn,"):
        with model.attention(lambda q, k, v, mask, scale, layer: v.repeat_interleave(2, 1).transpose(1, 2)):
            model(inputs)
