"""Junctions: torch hooks that are there only while a point needs them, and that run before everybody else's."""

import pytest
import torch
from torch import nn

from hooked_mllm.hooks import HookPoint, Junction
from hooked_mllm.hooks.module_hook import Call


class Block(nn.Module):
    """Returns what it is given, and more, in the ways that transformers' modules do."""

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states, factor=1.0):
        out = hidden_states * factor
        return (out, "weights") if self.pair else out


def joined(module: nn.Module, kind: str, *names: str) -> tuple[Junction, list[HookPoint]]:
    """A junction with points on the first argument or the first output."""
    junction = Junction(module, kind)
    points = [HookPoint(n, tower="text", block=0, on_change=lambda _: junction.refresh()) for n in names]
    for p in points:
        if kind == "pre":
            junction.bind(p, Call.first, Call.set_first)
        else:
            junction.bind(p, Call.main, Call.set_main)
    return junction, points


def torch_hooks(module: nn.Module) -> int:
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_the_module_carries_a_torch_hook_only_while_a_point_is_in_use(kind):
    module = Block()
    junction, (a, b) = joined(module, kind, "a", "b")
    assert torch_hooks(module) == 0
    one, two = a.add_hook(lambda x, hook: None), b.add_hook(lambda x, hook: None)
    assert torch_hooks(module) == 1
    a.remove(one)
    assert torch_hooks(module) == 1
    b.remove(two)
    assert torch_hooks(module) == 0 and junction.handle is None


@pytest.mark.parametrize("as_keyword", [False, True])
def test_an_input_is_replaced_however_it_was_passed(as_keyword):
    module = Block()
    _, (p,) = joined(module, "pre", "p")
    p.add_hook(lambda x, hook: x + 1)
    x = torch.ones(2)
    out = module(hidden_states=x, factor=3.0) if as_keyword else module(x, 3.0)
    assert out.tolist() == [6, 6] and x.tolist() == [1, 1]


def test_the_first_of_several_outputs_is_replaced():
    module = Block(pair=True)
    _, (p,) = joined(module, "post", "p")
    p.add_hook(lambda x, hook: x + 1)
    out, weights = module(torch.ones(2))
    assert out.tolist() == [2, 2] and weights == "weights"


def test_points_run_in_the_order_in_which_they_were_bound():
    module, order = Block(), []
    _, (a, b) = joined(module, "post", "a", "b")
    b.add_hook(lambda x, hook: order.append((hook.name, x.item())))
    a.add_hook(lambda x, hook: (order.append((hook.name, x.item())), x + 1)[1])
    module(torch.zeros(1))
    assert order == [("a", 0), ("b", 1)]


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_that_others_hung_before_see_the_edit(kind):
    module, seen = Block(), []
    if kind == "pre":
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].item()))
    else:
        module.register_forward_hook(lambda m, args, out: seen.append(out.item()))
    _, (p,) = joined(module, kind, "p")
    p.add_hook(lambda x, hook: x + 1)
    module(torch.zeros(1))
    assert seen == [1]


def test_a_point_without_a_value_on_this_call_does_not_fire():
    module = Block()
    p = HookPoint("p", tower="text", block=0, on_change=lambda _: junction.refresh())
    junction = Junction(module, "post")
    junction.bind(p, lambda call: None, Call.set_main)
    p.add_hook(lambda x, hook: pytest.fail("fired"))
    assert module(torch.ones(1)).item() == 1


def test_watchers_run_first_and_only_for_their_points():
    module, order = Block(), []
    junction, (a, b) = joined(module, "post", "a", "b")
    junction.watch(lambda call: order.append("watched"), [b])
    a.add_hook(lambda x, hook: order.append("a"))
    module(torch.ones(1))
    b.add_hook(lambda x, hook: order.append("b"))
    module(torch.ones(1))
    assert order == ["a", "watched", "a", "b"]


def test_an_untouched_call_passes_through_as_it_is():
    module = Block()
    _, (p,) = joined(module, "post", "p")
    p.add_hook(lambda x, hook: x)
    x = torch.ones(1)
    module.forward = lambda hidden_states: hidden_states
    assert module(x) is x
