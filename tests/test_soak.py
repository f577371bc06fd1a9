"""A long random use of one model: whatever was done before, with nothing active logits are those of transformers.

300 steps by default; SOAK_STEPS=1500 for more. The steps are the same in every run.
"""

import os
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from helpers.tiny import FAMILIES, HIDDEN, tiny_image, tiny_processor
from helpers.wrapped import fresh, plain, wrapped
from hooked_mllm import ActivationPatch, AttentionKnockout, HeadAblation, HookedMLLM, HybridAttention, Steer, metrics

pytestmark = pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")

STEPS = int(os.environ.get("SOAK_STEPS", "300"))
#: steps with one model, at most
LENGTH = 50
POINTS = (
    "hook_embed",
    "vision.blocks.0.attn.hook_z",
    "projector.hook_out",
    "blocks.0.hook_resid_post",
    "blocks.1.attn.hook_pattern",
    "blocks.1.attn.hook_result",
    "blocks.2.attn.hook_z",
    "blocks.2.ln2.hook_scale",
    "hook_logits",
)
#: edits: returned, in place, past autograd, and none
HOOKS = (
    lambda x, hook: x * 0.5,
    lambda x, hook: [x.mul_(2)].clear(),
    lambda x, hook: [x.data.mul_(0.5)].clear(),
    lambda x, hook: None,
)
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
COUNT = {"steps": 0, "compared": 0}


class StopRunError(Exception):
    """Raised by a hook in the middle of a run."""


def stop(x, hook):
    raise StopRunError(hook.name)


@cache
def inputs(family):
    """A sample with a picture, one with another, and a batch of both."""
    model = wrapped(family)
    questions = ["Where is the mug?", "What colour is the dog in the picture?"]
    images = [tiny_image(), tiny_image(24, 32)]
    singles = [model.prepare(q, images=i) for q, i in zip(questions, images, strict=True)]
    return [*singles, model.prepare(questions, images=[[i] for i in images])]


@cache
def expected(family, number):
    """Logits of a model that was never wrapped."""
    tensors = inputs(family)[number].inputs
    return plain(family)(**tensors, use_cache=False).logits


@cache
def source(family):
    """The cache that patches are taken from."""
    return wrapped(family).run_with_cache(inputs(family)[0], "blocks.1.hook_resid_post")[1]


SAMPLES, PLACES, EDITS = st.integers(0, 2), st.sampled_from(POINTS), st.sampled_from(HOOKS)


class Soak(RuleBasedStateMachine):
    """Hooks, interventions and attentions that open and close in any order, and runs of every kind between."""

    @initialize(family=st.sampled_from(FAMILIES))
    def load(self, family):
        self.family = family
        self.model = HookedMLLM.from_model(fresh(family), tiny_processor(family), check=False)
        self.open, self.lasting, self.cache = [], False, None

    @property
    def samples(self):
        return inputs(self.family)

    def enter(self, context):
        context.__enter__()
        self.open.append(context)

    # -- what becomes active and is removed again ------------------------------------------------------------------

    @precondition(lambda self: len(self.open) < 4)
    @rule(place=PLACES, edit=EDITS, backward=st.booleans())
    def hook(self, place, edit, backward):
        self.enter(self.model.hooks([(place, edit)], [("blocks.1.attn.hook_z", lambda g, hook: None)] * backward))

    @precondition(lambda self: len(self.open) < 4)
    @rule(kind=st.integers(0, 3), phase=st.sampled_from(["prefill", "decode", "both"]))
    def intervention(self, kind, phase):
        made = (
            lambda: HeadAblation(["L1H2", "L2H0"], mode="zero", phase=phase),
            lambda: Steer(torch.ones(HIDDEN), layer=1, positions="visual", coefficient=0.5, phase="prefill"),
            lambda: AttentionKnockout(layers=[0], queries="question", keys="visual", phase="prefill"),
            lambda: ActivationPatch("resid_post", source(self.family), layers=[1], positions=[1], source_positions=[2]),
        )
        self.enter(self.model.intervene(made[kind]()))

    @precondition(lambda self: len(self.open) < 4)
    @rule(kind=st.integers(0, 2), tower=st.sampled_from(["text", "vision"]))
    def attention(self, kind, tower):
        choice = ("eager", "sdpa", HybridAttention(["L1H0"], sink=1, window=3) if tower == "text" else "eager")[kind]
        self.enter(self.model.attention(choice, tower=tower))

    @rule(place=PLACES, edit=EDITS, permanent=st.booleans())
    def lasting_hook(self, place, edit, permanent):
        self.model.add_hook(place, edit, is_permanent=permanent)
        self.lasting = True

    @rule()
    def reset(self):
        self.model.reset_hooks(including_permanent=True)
        self.lasting = False

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close(self, data):
        self.open.pop(data.draw(st.integers(0, len(self.open) - 1))).__exit__(None, None, None)

    @precondition(lambda self: self.open)
    @rule()
    def close_all(self):
        while self.open:
            self.open.pop(0).__exit__(None, None, None)

    # -- runs ------------------------------------------------------------------------------------------------------

    @rule(number=SAMPLES, layer=st.integers(0, 3))
    def forward_to(self, number, layer):
        assert self.model(self.samples[number], stop_at_layer=layer).shape[-1] == HIDDEN

    @rule(number=SAMPLES, keep=st.booleans())
    def generate(self, number, keep):
        if keep:
            _, self.cache = self.model.run_with_cache(self.samples[number], "*hook_pattern", generate=GREEDY)
            assert len(self.cache.steps) == 3
        else:
            self.model.generate(self.samples[number], **GREEDY)

    @rule(number=SAMPLES, names=st.sampled_from([None, "*hook_z", "*hook_result", "*attn_scores", list(POINTS)]))
    def caching(self, number, names):
        logits, self.cache = self.model.run_with_cache(self.samples[number], names)
        assert torch.equal(self.cache["logits"], logits) if "hook_logits" in self.cache else len(self.cache)

    @rule(number=SAMPLES)
    def gradients(self, number):
        loss = lambda logits: logits[:, -1].logsumexp(-1).sum()  # noqa: E731
        _, kept = self.model.run_with_cache(self.samples[number], ["hook_embed", "blocks.1.attn.hook_z"], incl_bwd=loss)
        assert "hook_embed_grad" in kept

    @rule(number=SAMPLES, place=PLACES)
    def edited(self, number, place):
        self.model.run_with_hooks(self.samples[number], fwd_hooks=[(place, HOOKS[0])])

    @rule(number=SAMPLES, place=PLACES)
    def stopped_by_an_error(self, number, place):
        with pytest.raises(StopRunError), self.model.hooks([(place, stop)]):
            self.model.run_with_cache(self.samples[number])

    @rule(number=SAMPLES, place=PLACES)
    def run_inside_of_a_run(self, number, place):
        runs = []

        def nested(x, hook):
            if not runs:
                runs.append(self.model.run_with_cache(self.samples[0], "*hook_z"))

        self.model.run_with_hooks(self.samples[number], fwd_hooks=[(place, nested)])
        assert runs

    @rule(number=SAMPLES)
    def measuring(self, number):
        scores = self.model.measure([self.samples[number]], metrics.VisionMass(), progress=False)
        assert scores.values.shape == (3, 4)

    @rule()
    def check_wiring(self):
        if not self.lasting and not self.open:
            self.model.check()

    # -- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def nothing_active_is_plain(self):
        COUNT["steps"] += 1
        if not self.lasting and not self.open:
            number = COUNT["compared"] % 3
            COUNT["compared"] += 1
            with torch.no_grad():
                assert torch.equal(self.model(self.samples[number]), expected(self.family, number))
                direct = self.model.hf_model(**self.samples[number].inputs, use_cache=False).logits
            assert torch.equal(direct, expected(self.family, number))
            assert self.model.list_hooks() == {} and not self.model.wiring.has_hooks

    def teardown(self):
        if hasattr(self, "model"):
            self.close_all()
            self.reset()
            self.nothing_active_is_plain()


@pytest.mark.slow
def test_soak():
    COUNT.update(steps=0, compared=0)
    options = settings(
        max_examples=STEPS // 40 + 2,
        stateful_step_count=LENGTH,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Soak, settings=options)
    assert COUNT["steps"] >= STEPS and COUNT["compared"] >= STEPS // 10, COUNT
