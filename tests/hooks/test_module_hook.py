"""ModuleHook: a torch hook that is registered only while a point needs it, and that runs before all others."""

import pytest
import torch
from torch import nn

from hooked_mllm.hooks import Call, HookPoint, Junction, ModuleHook


class Block(nn.Module):
    """Returns its input times a factor, alone or as the first of two, as transformers' modules do."""

    def __init__(self, pair: bool = False) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, hidden_states, factor=1.0):
        out = hidden_states * factor
        return (out, "weights") if self.pair else out


def hooked(module: nn.Module, kind: str, *names: str) -> tuple[ModuleHook, list[HookPoint]]:
    """A module hook with points on the first argument or the first output."""
    module_hook = ModuleHook(module, kind)
    points = [HookPoint(n, tower="text", block=0, on_change=lambda _: module_hook.refresh()) for n in names]
    for p in points:
        if kind == "pre":
            module_hook.bind(p, Call.first, Call.set_first)
        else:
            module_hook.bind(p, Call.main, Call.set_main)
    return module_hook, points


def torch_hooks(module: nn.Module) -> int:
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_the_module_carries_a_torch_hook_only_while_a_point_is_in_use(kind):
    module = Block()
    module_hook, (a, b) = hooked(module, kind, "a", "b")
    assert torch_hooks(module) == 0
    one, two = a.add_hook(lambda x, hook: None), b.add_hook(lambda x, hook: None)
    assert torch_hooks(module) == 1
    a.remove(one)
    assert torch_hooks(module) == 1
    b.remove(two)
    assert torch_hooks(module) == 0 and module_hook.handle is None


@pytest.mark.parametrize("as_keyword", [False, True])
def test_an_input_is_replaced_positional_or_by_keyword(as_keyword):
    module = Block()
    _, (p,) = hooked(module, "pre", "p")
    p.add_hook(lambda x, hook: x + 1)
    x = torch.ones(2)
    out = module(hidden_states=x, factor=3.0) if as_keyword else module(x, 3.0)
    assert out.tolist() == [6, 6] and x.tolist() == [1, 1]


def test_the_first_of_several_outputs_is_replaced():
    module = Block(pair=True)
    _, (p,) = hooked(module, "post", "p")
    p.add_hook(lambda x, hook: x + 1)
    out, weights = module(torch.ones(2))
    assert out.tolist() == [2, 2] and weights == "weights"


def test_points_run_in_the_order_in_which_they_were_bound():
    module, order = Block(), []
    _, (a, b) = hooked(module, "post", "a", "b")
    b.add_hook(lambda x, hook: order.append((hook.name, x.item())))
    a.add_hook(lambda x, hook: (order.append((hook.name, x.item())), x + 1)[1])
    module(torch.zeros(1))
    assert order == [("a", 0), ("b", 1)]


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_that_were_registered_before_see_the_edit(kind):
    module, seen = Block(), []
    if kind == "pre":
        module.register_forward_pre_hook(lambda m, args: seen.append(args[0].item()))
    else:
        module.register_forward_hook(lambda m, args, out: seen.append(out.item()))
    _, (p,) = hooked(module, kind, "p")
    p.add_hook(lambda x, hook: x + 1)
    module(torch.zeros(1))
    assert seen == [1]


def test_a_point_without_a_value_on_this_call_does_not_fire():
    module = Block()
    p = HookPoint("p", tower="text", block=0, on_change=lambda _: module_hook.refresh())
    module_hook = ModuleHook(module, "post")
    module_hook.bind(p, lambda call: None, Call.set_main)
    p.add_hook(lambda x, hook: pytest.fail("fired"))
    assert module(torch.ones(1)).item() == 1


def test_watchers_run_first_and_only_for_their_points():
    module, order = Block(), []
    module_hook, (a, b) = hooked(module, "post", "a", "b")
    module_hook.watch(lambda call: order.append("watched"), [b])
    a.add_hook(lambda x, hook: order.append("a"))
    module(torch.ones(1))
    b.add_hook(lambda x, hook: order.append("b"))
    module(torch.ones(1))
    assert order == ["a", "watched", "a", "b"]


def test_an_untouched_call_passes_through_as_it_is():
    module = Block()
    _, (p,) = hooked(module, "post", "p")
    p.add_hook(lambda x, hook: x)
    x = torch.ones(1)
    module.forward = lambda hidden_states: hidden_states
    assert module(x) is x


def test_a_function_that_several_points_need_is_called_once_a_call():
    module, calls = Block(), []
    module_hook, (a, b) = hooked(module, "post", "a", "b")
    for point in (a, b):
        module_hook.watch(calls.append, [point])
        point.add_hook(lambda x, hook: None)
    module(torch.ones(1))
    assert len(calls) == 1 and len(module_hook.points) == 4


def test_the_earlier_name_is_the_same_class():
    assert Junction is ModuleHook
