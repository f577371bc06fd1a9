"""HookRegistry: the points that a name filter selects, and that exactly the registered hooks are removed."""

import re

import pytest
import torch

from hooked_mllm.errors import HookNameError, HookValueError
from hooked_mllm.hooks import HookPoint, HookRegistry

NAMES = [
    "vision.blocks.0.hook_resid_post",
    "hook_embed",
    "blocks.0.attn.hook_z",
    "blocks.0.hook_resid_post",
    "blocks.1.attn.hook_z",
    "blocks.1.hook_resid_post",
]
TEXT_RESID = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture
def registry() -> HookRegistry:
    made = HookRegistry("a test model")
    for name in NAMES:
        block = re.search(r"blocks\.(\d+)", name)
        tower = "vision" if name.startswith("vision") else "text"
        made.add(HookPoint(name, tower=tower, block=int(block[1]) if block else None, context=made.context))
    return made


def nothing(x, hook):
    return None


def registered(registry) -> dict[str, int]:
    return {name: len(handles) for name, handles in registry.list_hooks().items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, NAMES),
        ("hook_embed", ["hook_embed"]),
        ("blocks.*.hook_resid_post", TEXT_RESID),
        ("*hook_resid_post", [NAMES[0], *TEXT_RESID]),
        ("blocks.[1-9].attn.*", ["blocks.1.attn.hook_z"]),
        (re.compile(r"^blocks\.\d+\.attn"), ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]),
        (lambda n: n.endswith("hook_resid_post"), [NAMES[0], *TEXT_RESID]),
        (lambda n: False, []),
        (["blocks.1.attn.hook_z", "hook_embed"], ["hook_embed", "blocks.1.attn.hook_z"]),
        (("hook_embed", "*hook_embed", lambda n: n == "hook_embed"), ["hook_embed"]),
        ({"hook_embed"}, ["hook_embed"]),
        ([], []),
    ],
)
def test_the_points_a_filter_means_each_once_in_forward_order(registry, names, expected):
    assert [p.name for p in registry.select(names)] == expected


def test_a_point_is_a_filter_too(registry):
    assert registry.select([registry["hook_embed"]]) == [registry["hook_embed"]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("blocks.0.atn.hook_z", "no hook point 'blocks.0.atn.hook_z'. Did you mean 'blocks.0.attn.hook_z'"),
        (["hook_embed", "hook_embd"], "no hook point 'hook_embd'. Did you mean 'hook_embed'"),
        ("blocks.*.hook_nothing", "matches 'blocks.*.hook_nothing'"),
        (re.compile("^embed"), "matches '^embed'"),
        ("blocks.7.attn.hook_z", "no hook point 'blocks.7.attn.hook_z'"),
        ("z", "of all layers the points are '*hook_z', of one 'blocks.0.attn.hook_z'"),
    ],
)
def test_unknown_names_are_errors_that_name_the_nearest_and_register_nothing(registry, names, message):
    with pytest.raises(HookNameError, match=re.escape(message)) as error:
        registry.attach(names, nothing)
    assert isinstance(error.value, KeyError)
    assert registered(registry) == {}


def test_a_filter_of_another_type_is_an_error(registry):
    with pytest.raises(HookValueError, match="A name filter is a hook name, a glob.* got int"):
        registry.select([3])


@pytest.mark.parametrize("hooks", [("hook_embed", nothing), [("hook_embed",)], [("hook_embed", "nothing")], [nothing]])
def test_hooks_that_are_no_pairs_are_an_error(registry, hooks):
    for fwd_hooks, bwd_hooks in ((hooks, ()), ((), hooks)):
        with (
            pytest.raises(HookValueError, match=r"_hooks is a list of pairs \(names, function\)"),
            registry.hooks(fwd_hooks, bwd_hooks),
        ):
            pytest.fail("entered")
    with registry.hooks(pair for pair in [("hook_embed", nothing)]):
        assert registered(registry) == {"hook_embed": 1}


def test_after_a_failing_pair_the_earlier_ones_are_removed(registry):
    with pytest.raises(HookNameError), registry.hooks([("hook_embed", nothing), ("nowhere", nothing)]):
        pytest.fail("entered")
    with pytest.raises(HookValueError), registry.hooks([("hook_embed", nothing), (["*hook_z", 3], nothing)]):
        pytest.fail("entered")
    assert registered(registry) == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_removed_when_the_body_raises_and_outer_ones_stay(registry, error):
    with registry.hooks([("hook_embed", nothing)]):
        with pytest.raises(error), registry.hooks([("hook_embed", nothing)], [("*hook_z", nothing)]):
            assert registered(registry) == {"hook_embed": 2, "blocks.0.attn.hook_z": 1, "blocks.1.attn.hook_z": 1}
            raise error
        assert registered(registry) == {"hook_embed": 1}
    assert registered(registry) == {}


def test_order_over_the_ways_of_adding(registry):
    order = []

    def named(name):
        return lambda x, hook: order.append(name)

    p = registry["hook_embed"]
    registry.attach("hook_embed", named("added"))
    registry.attach("hook_embed", named("permanent"), is_permanent=True)
    inner = [("*", named("run 1")), ("hook_embed", named("run 2"))]
    with registry.hooks([("hook_embed", named("outer"))]), registry.hooks(inner):
        registry.attach("hook_embed", named("prepended"), prepend=True)
        p.run(torch.zeros(1))
    assert order == ["prepended", "added", "permanent", "outer", "run 1", "run 2"]


def test_resetting_inside_a_context_is_safe(registry):
    with registry.hooks([("hook_embed", nothing)]):
        registry.reset_hooks()
        assert registered(registry) == {}
        registry.attach("*hook_z", nothing)
    assert registered(registry) == {"blocks.0.attn.hook_z": 1, "blocks.1.attn.hook_z": 1}


def test_hooks_may_stay_registered(registry):
    with registry.hooks([("hook_embed", nothing)], reset_hooks_end=False):
        pass
    assert registered(registry) == {"hook_embed": 1}


def test_permanent_hooks_and_levels(registry):
    registry.attach("hook_embed", nothing, is_permanent=True)
    registry.attach("*hook_z", nothing, level=1)
    registry.attach("*hook_z", nothing, level=2)
    registry.reset_hooks(level=1)
    assert registered(registry) == {"hook_embed": 1, "blocks.0.attn.hook_z": 1, "blocks.1.attn.hook_z": 1}
    registry.reset_hooks()
    assert registered(registry) == {"hook_embed": 1}
    registry.reset_hooks(including_permanent=True)
    assert registered(registry) == {}


def test_contexts_are_kept_and_cleared_as_specified(registry):
    ctx = registry["hook_embed"].ctx
    ctx["n"] = 1
    with registry.hooks([("hook_embed", nothing)]):
        pass
    registry.reset_hooks(clear_contexts=False)
    assert registry["hook_embed"].ctx == {"n": 1}
    with registry.hooks([], clear_contexts=True):
        pass
    assert registry["hook_embed"].ctx == {}


def test_list_hooks_filters(registry):
    registry.attach("hook_embed", nothing)
    registry.attach("*hook_z", nothing, dir="bwd")
    registry.attach("blocks.0.attn.hook_z", nothing, is_permanent=True)
    assert list(registry.list_hooks(dir="fwd")) == ["hook_embed", "blocks.0.attn.hook_z"]
    assert list(registry.list_hooks(dir="bwd")) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
    assert list(registry.list_hooks(dir="fwd", including_permanent=False)) == ["hook_embed"]
    assert list(registry.list_hooks("blocks.*")) == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
