"""HookPoint: what a hook may do to an activation and its gradient, and the order of hooks."""

import inspect

import pytest
import torch

from hooked_mllm.errors import HookValueError
from hooked_mllm.hooks import HookPoint


def point(**more) -> HookPoint:
    return HookPoint("blocks.3.attn.hook_z", tower="text", block=3, **more)


def adding(number):
    return lambda x, hook: x + number


def test_a_hook_is_called_with_the_activation_and_its_point():
    p, seen = point(), []
    p.add_hook(lambda x, hook: seen.append((x, hook)))
    x = torch.arange(3.0)
    out, edited = p.run(x)
    assert out is x and not edited
    assert seen[0][0] is x and seen[0][1] is p
    assert (p.name, p.layer(), p.step) == ("blocks.3.attn.hook_z", 3, 0)


def test_a_returned_tensor_replaces_the_activation():
    p = point()
    p.add_hook(lambda x, hook: x * 2)
    out, edited = p.run(torch.arange(3.0))
    assert edited and out.tolist() == [0, 2, 4]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("also_returns", [False, True])
def test_an_edit_in_place_counts(inference, also_returns):
    p = point()
    p.add_hook(lambda x, hook: x.mul_(2) if also_returns else (x.mul_(2), None)[1])
    with torch.inference_mode(inference):
        out, edited = p.run(torch.arange(3.0))
    assert edited and out.tolist() == [0, 2, 4]


@pytest.mark.parametrize("inference", [False, True])
def test_reading_is_no_edit(inference):
    p = point()
    p.add_hook(lambda x, hook: x)
    p.add_hook(lambda x, hook: None)
    with torch.inference_mode(inference):
        assert p.run(torch.arange(3.0))[1] is False


def test_hooks_run_in_order_of_adding_and_prepend_goes_first():
    p, order = point(), []
    for name in "ab":
        p.add_hook(lambda x, hook, name=name: order.append(name))
    p.add_hook(lambda x, hook: order.append("first"), prepend=True)
    p.run(torch.zeros(1))
    assert order == ["first", "a", "b"]


def test_a_hook_sees_what_the_hook_before_it_made():
    p = point()
    p.add_hook(adding(1))
    p.add_hook(lambda x, hook: x * 10)
    assert p.run(torch.zeros(1))[0].item() == 10


def test_a_function_may_be_registered_twice_with_two_handles():
    p, fn = point(), adding(1)
    one, two = p.add_hook(fn), p.add_hook(fn)
    assert p.run(torch.zeros(1))[0].item() == 2
    p.remove(two)
    p.remove(two)  # removed before: no error
    assert p.fwd_hooks == [one]


def test_a_hook_may_remove_itself():
    p = point()

    def once(x, hook):
        hook.remove(handle)
        return x + 1

    handle = p.add_hook(once)
    p.add_hook(adding(10))  # runs all the same
    assert [p.run(torch.zeros(1))[0].item() for _ in range(2)] == [11, 10]


@pytest.mark.parametrize(
    ("kwargs", "left"),
    [
        ({}, ["bwd", "level bwd", "perma"]),
        ({"dir": "bwd"}, ["fwd", "level fwd", "perma"]),
        ({"dir": "both"}, ["perma"]),
        ({"dir": "both", "level": 1}, ["bwd", "fwd", "perma"]),
        ({"dir": "both", "including_permanent": True}, []),
    ],
    ids=lambda v: "" if isinstance(v, list) else str(v),
)
def test_what_remove_hooks_leaves(kwargs, left):
    p = point()
    named = {
        "fwd": p.add_hook(adding(1)),
        "bwd": p.add_hook(adding(1), dir="bwd"),
        "level fwd": p.add_hook(adding(1), level=1),
        "level bwd": p.add_hook(adding(1), dir="bwd", level=1),
        "perma": p.add_perma_hook(adding(1)),
    }
    p.remove_hooks(**kwargs)
    assert sorted(n for n, h in named.items() if h in p.fwd_hooks + p.bwd_hooks) == left


def test_has_hooks_by_direction_permanence_and_level():
    p = point()
    assert not p.has_hooks() and not p.active
    p.add_perma_hook(adding(1))
    assert p.has_hooks("fwd") and not p.has_hooks("bwd") and not p.has_hooks(including_permanent=False)
    p.add_hook(adding(1), dir="bwd", level=2)
    assert p.has_hooks("bwd", level=2) and not p.has_hooks(level=3)
    assert repr(p) == "HookPoint('blocks.3.attn.hook_z', fwd_hooks=1, bwd_hooks=1)"


def test_ctx_survives_runs_until_it_is_cleared():
    p = point()

    def count(x, hook):
        hook.ctx["n"] = hook.ctx.get("n", 0) + 1

    p.add_hook(count)
    p.run(torch.zeros(1))
    p.run(torch.zeros(1))
    assert p.ctx == {"n": 2}
    p.clear_context()
    assert p.ctx == {}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(2, 4), r"blocks.3.attn.hook_z returned shape \(2, 4\); expected \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.float64), "returned dtype torch.float64; expected torch.float32"),
        (torch.zeros(2, 3, device="meta"), "returned device meta; expected cpu"),
        (0.0, r"returned float; expected None or a tensor of shape \(2, 3\)"),
        ([torch.zeros(2, 3)], "returned list; expected None or a tensor"),
    ],
    ids=["shape", "dtype", "device", "number", "list"],
)
def test_a_result_that_does_not_fit_is_an_error(result, message):
    p = point()
    p.add_hook(lambda x, hook: result)
    with pytest.raises(HookValueError, match=message):
        p.run(torch.zeros(2, 3))


def test_bad_arguments_are_errors():
    p = point()
    add, remove = (inspect.unwrap(fn) for fn in (HookPoint.add_hook, HookPoint.remove_hooks))  # as users run them
    with pytest.raises(HookValueError, match="dir must be 'fwd' or 'bwd', got 'forward'"):
        add(p, adding(1), dir="forward")
    with pytest.raises(HookValueError, match="dir must be 'fwd', 'bwd' or 'both'"):
        remove(p, "all")
    with pytest.raises(HookValueError, match="must be callable, got int"):
        add(p, 3)
    with pytest.raises(HookValueError, match="hook_logits belongs to no block"):
        HookPoint("hook_logits", tower="text", block=None).layer()
    assert not p.active


def test_a_hook_that_cannot_be_registered_leaves_nothing():
    def fail(_):
        raise RuntimeError("no")

    p = point(on_change=fail)
    with pytest.raises(RuntimeError):
        p.add_hook(adding(1))
    assert not p.active


# -- gradients ---------------------------------------------------------------------------------------------------------


def through(p: HookPoint, x: torch.Tensor) -> torch.Tensor:
    """A function of x with the point in its middle: sum(sin(hook(x^2)))."""
    return torch.sin(p.run(x**2)[0]).sum()


def test_a_backward_hook_gets_the_gradient():
    p, seen = point(), []
    p.add_hook(lambda g, hook: seen.append((g, hook)), dir="bwd")
    x = torch.arange(3.0, requires_grad=True)
    through(p, x).backward()
    ((gradient, hook),) = seen
    assert hook is p
    torch.testing.assert_close(gradient, torch.cos(x.detach() ** 2))
    torch.testing.assert_close(x.grad, 2 * x.detach() * torch.cos(x.detach() ** 2))


@pytest.mark.parametrize("wrap", [lambda g: g, lambda g: (g,)], ids=["tensor", "tuple of one"])
def test_a_returned_gradient_replaces_it(wrap):
    p = point()
    p.add_hook(lambda g, hook: wrap(3 * g), dir="bwd")
    p.add_hook(lambda g, hook: g + 1, dir="bwd")  # sees what the first one returned
    x = torch.arange(3.0, requires_grad=True)
    through(p, x).backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() * (3 * torch.cos(x.detach() ** 2) + 1))


@pytest.mark.parametrize("result", [torch.zeros(4), 1.0, (torch.zeros(3), None)], ids=["shape", "number", "pair"])
def test_a_gradient_that_does_not_fit_is_an_error(result):
    p = point()
    p.add_hook(lambda g, hook: result, dir="bwd")
    with pytest.raises(HookValueError, match="blocks.3.attn.hook_z returned"):
        through(p, torch.arange(3.0, requires_grad=True)).backward()


def test_gradients_reach_activations_that_need_none():
    p, seen = point(), []
    p.add_hook(lambda g, hook: seen.append(g), dir="bwd")
    through(p, torch.arange(3.0)).backward()  # a frozen model
    torch.testing.assert_close(seen[0], torch.cos(torch.arange(3.0) ** 2))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_backward_hooks_are_not_called(off):
    p = point()
    p.add_hook(lambda g, hook: pytest.fail("called"), dir="bwd")
    with off():
        assert p.run(torch.zeros(2))[1] is False


def test_an_edit_in_place_does_not_spoil_what_autograd_saved():
    p = point()
    p.add_hook(lambda x, hook: (x.mul_(2), None)[1])
    x = torch.arange(3.0, requires_grad=True)
    s = torch.sigmoid(x)  # its backward needs its own result
    p.run(s)[0].sum().backward()
    torch.testing.assert_close(x.grad, (2 * s * (1 - s)).detach())
