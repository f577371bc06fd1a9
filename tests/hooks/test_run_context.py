"""Scopes and runs of one model, as threads, tasks and nested runs see them."""

import asyncio
import threading

import pytest

from hooked_mllm.hooks.run_context import Run, RunContext


def test_a_scope_is_active_until_it_is_closed_and_what_has_none_always():
    context = RunContext()
    with context.scope() as scope:
        assert context.sees(scope) and context.sees(None)
    assert not context.sees(scope) and context.sees(None)


def test_scopes_close_in_any_order():
    context = RunContext()
    a, b = context.scope(), context.scope()
    first, second = a.__enter__(), b.__enter__()
    a.__exit__(None, None, None)
    assert not context.sees(first) and context.sees(second)
    b.__exit__(None, None, None)
    assert not context.sees(second)


def test_another_thread_has_neither_scope_nor_run():
    context, seen = RunContext(), []
    with context.scope() as scope:
        thread = threading.Thread(target=lambda: seen.append((context.sees(scope), context.run)))
        thread.start()
        thread.join()
    assert seen == [(False, None)]


def test_runs_of_threads_take_turns():
    context, order = RunContext(), []
    started = threading.Event()

    def other():
        started.set()
        with context.running(Run("other")):
            order.append("other")

    with context.running(Run("mine")):
        thread = threading.Thread(target=other)
        thread.start()
        started.wait()
        order.append("mine")
    thread.join()
    assert order == ["mine", "other"]


def test_tasks_have_scopes_of_their_own():
    context = RunContext()

    async def task(turns):
        with context.scope() as scope:
            await asyncio.sleep(0)
            turns.append(scope)
            return [context.sees(s) for s in turns]

    async def both():
        turns = []
        return await asyncio.gather(task(turns), task(turns))

    assert asyncio.run(both()) == [[True], [False, True]]


def test_a_run_inside_of_a_run_sees_the_scopes_of_a_with_and_not_those_of_the_outer_run():
    context = RunContext()
    with context.scope() as ambient, context.scope(of_run=True) as outer, context.running(Run(1)):
        assert context.sees(ambient) and context.sees(outer)
        with context.scope(of_run=True) as inner:
            assert not context.sees(inner)  # it belongs to the run that comes next
            with context.running(Run(2)) as run:
                assert run.parent is not None and run.parent.inputs == 1
                assert context.sees(ambient) and context.sees(inner) and not context.sees(outer)
        assert context.sees(outer)


def test_the_run_in_progress_ends_with_an_error():
    context = RunContext()
    with pytest.raises(KeyError), context.running(Run(1)):
        raise KeyError
    assert context.run is None and context.step == 0


def test_registering_and_recomputing_hold_for_a_with():
    context = RunContext()
    with context.scope() as scope, context.registers_in(scope):
        assert context.registering is scope
        with context.recomputing({"hook_embed": ()}):
            assert context.recorded == {"hook_embed": ()}
    assert context.registering is None and context.recorded is None


def test_a_with_that_only_other_threads_ran_in_gives_a_warning():
    context = RunContext()

    def run():
        with context.running(Run(1)):
            assert context.run is not None

    with pytest.warns(UserWarning, match="in another thread or task"), context.scope():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    with context.scope():  # no warning: it ran here, too
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
