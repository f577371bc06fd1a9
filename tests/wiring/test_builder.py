"""Points and the module hooks that serve them are kept in step, on two linear modules."""

import pytest
import torch
from torch import nn

from hooked_mllm.hooks.registry import HookRegistry
from hooked_mllm.hooks.table import spec_of
from hooked_mllm.wiring.access import Access
from hooked_mllm.wiring.builder import Builder


class Output(Access):
    """The output of a module, with a watcher at the input of another one."""

    def __init__(self, path, watched=None):
        self.path, self.side, self.watched, self.seen = path, "output", watched, []

    def get(self, call):
        return call.main()

    def put(self, call, value):
        call.set_main(value)

    def watchers(self):
        return [] if self.watched is None else [(self.watched, "input", lambda call: self.seen.append(call.first()))]


@pytest.fixture
def built():
    """A model of two modules, and a builder with one point at the output of the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    builder = Builder(model, HookRegistry("Two"))
    point = builder.point(spec_of("blocks.0.hook_resid_post"), "text", 4)
    access = Output("1", watched="0")
    builder.bind(point, access)
    builder.finish()
    return model, builder, point, access


def torch_hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model]


def test_a_point_has_the_name_of_its_block_and_is_registered(built):
    _, builder, point, _ = built
    assert (point.name, point.tower, point.layer()) == ("blocks.4.hook_resid_post", "text", 4)
    assert builder.registry.hook_dict == {point.name: point}


def test_torch_hooks_are_there_only_while_a_point_is_in_use(built):
    model, _, point, _ = built
    assert torch_hooks(model) == [0, 0]
    point.add_hook(lambda x, hook: x + 1)
    assert torch_hooks(model) == [1, 1], "at the point and at what it watches"
    point.remove_hooks()
    assert torch_hooks(model) == [0, 0]


def test_an_edit_reaches_the_output_and_the_watcher_sees_the_input(built):
    model, _, point, access = built
    x = torch.randn(2, 3)
    plain = model(x)
    point.add_hook(lambda y, hook: y * 2)
    assert torch.equal(model(x), plain * 2)
    assert [torch.equal(seen, x) for seen in access.seen] == [True]


def test_one_side_of_a_module_has_one_module_hook(built):
    _, builder, _, _ = built
    assert builder.module_hook("1", "output") is builder.module_hook("1", "output")
    assert builder.module_hook("1", "output") is not builder.module_hook("1", "input")
    assert builder.module_hook("0", "output") is not builder.module_hook("1", "output")


def test_listeners_are_called_after_every_change(built):
    _, builder, point, _ = built
    changes = []
    builder.on_change(point, lambda: changes.append(point.has_hooks()))
    point.add_hook(lambda x, hook: None)
    point.remove_hooks()
    assert changes == [True, False]


def test_a_module_that_is_not_there():
    with pytest.raises(AttributeError, match="2"):
        Builder(nn.Sequential(nn.Linear(3, 3)), HookRegistry("One")).module_hook("2", "input")
