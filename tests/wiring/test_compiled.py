"""While hooks are active, no code that torch.compile made runs; the state of torch is restored by the last of them."""

import threading

import pytest
import torch

from hooked_mllm.errors import HookValueError
from hooked_mllm.wiring.compiled import UNCOMPILED, Uncompiled


def runs_compiled():
    """Whether a compiled function runs its compiled code: a backend returns another result than the function."""
    torch._dynamo.reset()

    def backend(graph, inputs):
        return lambda *args: tuple(value + 1 for value in graph(*args))

    return torch.compile(lambda x: x * 2, backend=backend)(torch.ones(1)).item() == 3


def test_compiled_code_is_left_out_inside():
    assert runs_compiled()
    with UNCOMPILED:
        assert not runs_compiled()
    assert runs_compiled()


def test_nested_and_in_threads_the_last_one_restores():
    uncompiled, entered, leave = Uncompiled(), threading.Event(), threading.Event()

    def other():
        with uncompiled:
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with uncompiled, uncompiled:
        assert uncompiled.count == 2
        thread.start()
        assert entered.wait(30) and uncompiled.count == 3
    assert uncompiled.count == 1
    leave.set()
    thread.join(30)
    assert uncompiled.count == 0 and runs_compiled()


def test_inside_a_compiled_call_it_raises(monkeypatch):
    def set_stance(stance):
        raise RuntimeError("in a compiled region")

    monkeypatch.setattr(torch.compiler, "set_stance", set_stance)
    uncompiled = Uncompiled()
    with pytest.raises(HookValueError, match="compiles from outside"):
        uncompiled.__enter__()
    assert uncompiled.count == 0
