"""What is active where: the runs of one model, and the scopes of its hooks, as one thread or task sees them.

A run is one forward pass or generation. A scope has what one `with` statement or one call registered; hooks without a
scope are active everywhere. Threads and asyncio tasks have their own runs and scopes (contextvars), and take turns.
"""

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NoReturn, Optional

from hooked_mllm.errors import HookValueError


@dataclass(eq=False)
class Run:
    """One forward pass or generation in progress.

    Attributes:
        inputs: What hooks read each position's kind from; None where it is unknown.
        parent: The run inside of which it was started, by a hook.
        first: Position in the sequence of the first row of text activations.
        prompt_length: Positions of the prompt; None where every row belongs to it.
        rows: Rows of text activations in this call of the model; None where it is unknown.
        step: 0 in the prefill, n in the n-th decoding step.
        fired: Names of the points whose hooks ran, and of the attentions that called taps or a backend.
    """

    inputs: Any
    parent: Optional["Run"] = None
    first: int = 0
    prompt_length: int | None = None
    rows: int | None = None
    step: int = 0
    fired: set[str] = field(default_factory=set)


@dataclass(eq=False)
class Scope:
    """What one `with` statement or call registered.

    Attributes:
        of_run: Whether runs that are started inside of its run are excluded.
        outer: The run inside of which it was opened.
    """

    of_run: bool
    outer: Run | None
    #: runs while it was open, in its own thread and task, and in others
    runs: int = 0
    runs_elsewhere: int = 0


class RunContext:
    """The runs and scopes of one model."""

    def __init__(self) -> None:
        #: held while the model runs and while hooks are registered; one thread may take it several times
        self.lock = threading.RLock()
        self._run: ContextVar[Run | None] = ContextVar("run", default=None)
        self._scopes: ContextVar[tuple[Scope, ...]] = ContextVar("scopes", default=())
        self._registering: ContextVar[Scope | None] = ContextVar("registering", default=None)
        self._recorded: ContextVar[Mapping[str, tuple[Any, ...]] | None] = ContextVar("recorded", default=None)
        #: scopes that are open in any thread or task
        self._open: list[Scope] = []

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise HookValueError(
            "Hook points and registered hooks belong to one model and are neither copied nor pickled. Remove them with "
            "`reset_hooks` or by leaving their `with`, and copy the HookedMLLM: `copy.deepcopy(model)`."
        )

    @property
    def run(self) -> Run | None:
        """The innermost run in progress."""
        return self._run.get()

    @property
    def step(self) -> int:
        """0 in the prefill or outside of a generation, n in the n-th decoding step."""
        run = self._run.get()
        return 0 if run is None else run.step

    @property
    def registering(self) -> Scope | None:
        """The scope of what is registered now; None for all runs."""
        return self._registering.get()

    @property
    def recorded(self) -> Mapping[str, tuple[Any, ...]] | None:
        """While a backward pass computes a block again: the hooks of the forward pass, by point; None otherwise."""
        return self._recorded.get()

    @contextmanager
    def recomputing(self, handles: Mapping[str, tuple[Any, ...]]) -> Iterator[None]:
        """Run exactly these hooks in the body of a `with`."""
        token = self._recorded.set(handles)
        try:
            yield
        finally:
            self._recorded.reset(token)

    def sees(self, scope: Scope | None) -> bool:
        """Whether what a scope contains is active here."""
        if scope is None:
            return True
        if scope not in self._scopes.get():
            return False
        if not scope.of_run:
            return True
        run = self._run.get()
        return scope.outer is (None if run is None else run.parent)

    @contextmanager
    def running(self, run: Run) -> Iterator[Run]:
        """Make `run` the one in progress; other threads wait until it has ended."""
        with self.lock:
            run.parent = self._run.get()
            token = self._run.set(run)
            here = self._scopes.get()
            for scope in tuple(self._open):
                scope.runs += scope in here
                scope.runs_elsewhere += scope not in here
            try:
                yield run
            finally:
                self._run.reset(token)

    @contextmanager
    def scope(self, of_run: bool = False) -> Iterator[Scope]:
        """Open a scope for the body of a `with`; scopes may be closed in any order."""
        scope = Scope(of_run, self._run.get())
        self._scopes.set((*self._scopes.get(), scope))
        self._open.append(scope)
        try:
            yield scope
        finally:
            self._open.remove(scope)
            self._scopes.set(tuple(s for s in self._scopes.get() if s is not scope))
        if scope.runs_elsewhere and not scope.runs:
            warnings.warn(
                "This model ran in another thread or task while a `with` of hooks, interventions or attention was "
                "open, and not in its own: they were not active there. Open the `with` where the model runs, or start "
                "the thread with `contextvars.copy_context().run`.",
                stacklevel=5,
            )

    @contextmanager
    def registers_in(self, scope: Scope | None) -> Iterator[None]:
        """Add everything that is registered in the body of a `with` to a scope."""
        token = self._registering.set(scope)
        try:
            yield
        finally:
            self._registering.reset(token)
