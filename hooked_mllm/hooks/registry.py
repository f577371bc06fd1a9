"""The hook points of a model by name: look them up, register hooks on them, remove the hooks."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from torch import Tensor

from hooked_mllm.errors import HookNameError, HookValueError, nearest
from hooked_mllm.hooks.point import Direction, Directions, Handle, HookFunction, HookPoint
from hooked_mllm.hooks.run_context import Run, RunContext

if TYPE_CHECKING:
    #: a hook name, a glob ("blocks.*.attn.hook_z"), a compiled regular expression, a predicate on names, or a point
    NameSelector = str | re.Pattern[str] | Callable[[str], bool] | HookPoint
    #: one of these, several, or None for all points
    NameFilter = NameSelector | Iterable[NameSelector] | None
    #: pairs of a name filter and a hook, as `run_with_hooks` takes them
    HookList = Iterable[tuple[NameFilter, HookFunction]]
else:  # wider at run time, so that other values reach the checks whose errors state what is expected
    NameFilter = str | re.Pattern[str] | Callable[[str], bool] | HookPoint | Iterable[Any] | None
    HookList = Iterable[Any]


class HookOptions(TypedDict, total=False):
    """The options of `HookPoint.add_hook`, which describes them."""

    is_permanent: bool
    level: int | None
    prepend: bool
    reads_only: bool


class HookRegistry:
    """All hook points of one model, in the order of the forward pass.

    Args:
        family: Name of the model's class, for error messages.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.context = RunContext()
        #: entered at the start of every run
        self.on_run: list[Callable[[], AbstractContextManager[Any]]] = []
        #: names of the points with a hook, in any thread; `on_use` is called when it becomes empty or no longer is
        self.used: set[str] = set()
        self.on_use: Callable[[bool], None] | None = None
        self.hook_dict: dict[str, HookPoint] = {}

    def add(self, point: HookPoint) -> HookPoint:
        """Add a point, and return it."""
        self.hook_dict[point.name] = point
        return point

    def changed(self, point: HookPoint) -> None:
        """Note whether a point has hooks."""
        before = bool(self.used)
        self.used.add(point.name) if point.registered else self.used.discard(point.name)
        if self.on_use is not None and bool(self.used) != before:
            self.on_use(not before)

    @property
    def running(self) -> Any:
        """The inputs of the run in progress, from which hooks read what each position is; None between runs."""
        run = self.context.run
        return None if run is None else run.inputs

    @property
    def first(self) -> int:
        """The position of the first row of text activations: above 0 where only a part of a sequence is run."""
        run = self.context.run
        return 0 if run is None else run.first

    @contextmanager
    def running_on(self, inputs: Any, first: int = 0) -> Iterator[Run]:
        """Start a run on `inputs`, whose first row of text activations is at position `first`, for a `with`."""
        with self.context.running(Run(inputs, first=first)) as run, ExitStack() as stack:
            for enter in self.on_run:
                stack.enter_context(enter())
            yield run

    @property
    def in_use(self) -> bool:
        """Whether a hook is active here."""
        return any(point.active for point in self.registered)

    @property
    def registered(self) -> list[HookPoint]:
        """The points with a hook, of any thread, in the order of the forward pass."""
        return [p for p in self.hook_dict.values() if p.name in self.used] if self.used else []

    # -- looking up ------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> HookPoint:
        if name in self.hook_dict:
            return self.hook_dict[name]
        hint, full_names = nearest(name, self.hook_dict), self.select_short(name)
        if full_names:
            every = f"'*hook_{name}'"
            hint = f"Short names are keys of a cache; of all layers the points are {every}, of one {full_names[0]!r}."
        raise HookNameError(f"{self.family} has no hook point {name!r}. {hint} `model.hook_dict` lists all of them.")

    def select_short(self, name: str) -> list[str]:
        """Names of the points whose short name, as in keys of a cache, is `name`: "z", "resid_post"."""
        return [full for full in self.hook_dict if full.endswith(f".hook_{name}")]

    def select(self, names: NameFilter) -> list[HookPoint]:
        """The points that a name filter selects; each once, in the order of the forward pass.

        Args:
            names: None (all), a name, a glob, a compiled regular expression, a predicate, or an iterable of these.

        Raises:
            HookNameError: For a name, a glob or an expression without a match; a predicate may have none.
            HookValueError: For a filter of another type.
        """
        if names is None:
            return list(self.hook_dict.values())
        selected_points = set(self._matches(names))
        return [p for p in self.hook_dict.values() if p in selected_points]

    def _matches(self, names: Any) -> list[HookPoint]:  # any value: of other types it raises
        if isinstance(names, HookPoint):
            return [self[names.name]]
        if isinstance(names, str):
            if not any(c in names for c in "*?["):
                return [self[names]]
            matches = [p for n, p in self.hook_dict.items() if fnmatch.fnmatchcase(n, names)]
        elif isinstance(names, re.Pattern):
            matches = [p for n, p in self.hook_dict.items() if names.search(n)]
        elif callable(names):
            return [p for n, p in self.hook_dict.items() if names(n)]
        elif isinstance(names, Iterable) and not isinstance(names, Tensor):
            return [p for name in names for p in self._matches(name)]
        else:
            raise HookValueError(
                "A name filter is a hook name, a glob, a compiled regular expression, a predicate on names, or a "
                f"list of these; got {type(names).__name__}."
            )
        if not matches:
            pattern = names if isinstance(names, str) else names.pattern
            raise HookNameError(
                f"No hook point of {self.family} matches {pattern!r}. {nearest(pattern, self.hook_dict)} "
                "`model.hook_dict` lists all of them."
            )
        return matches

    def list_hooks(
        self, name_filter: NameFilter = None, dir: Directions = "both", including_permanent: bool = True
    ) -> dict[str, list[Handle]]:
        """The registered hooks, by the name of their point.

        Args:
            name_filter: Only points that it selects.
            dir: Only hooks on activations ("fwd"), on gradients ("bwd"), or "both".
            including_permanent: List permanent hooks, too.
        """
        handles_by_name: dict[str, list[Handle]] = {}
        for point in self.select(name_filter):
            handles = [h for h in (*point.fwd_hooks, *point.bwd_hooks) if h.fits(dir, including_permanent)]
            if handles:
                handles_by_name[point.name] = handles
        return handles_by_name

    # -- adding and removing ---------------------------------------------------------------------------------------

    def attach(
        self, names: NameFilter, fn: HookFunction, dir: Direction = "fwd", **how: Unpack[HookOptions]
    ) -> list[tuple[HookPoint, Handle]]:
        """Register a hook on every point that `select` finds, after an error on none of them; see `HookPoint.add_hook`.

        Returns the points and handles, as `detach` takes them.
        """
        added: list[tuple[HookPoint, Handle]] = []
        try:
            for point in self.select(names):
                added.append((point, point.add_hook(fn, dir, **how)))
        except BaseException:
            self.detach(added)
            raise
        return added

    def detach(self, added: Iterable[tuple[HookPoint, Handle]]) -> None:
        """Remove exactly these hooks."""
        for point, handle in added:
            point.remove(handle)

    @contextmanager
    def attached(
        self, names: NameFilter, fn: HookFunction, dir: Direction = "fwd", **how: Unpack[HookOptions]
    ) -> Iterator[None]:
        """Register a hook for the runs of the body of a `with`, without those that hooks start inside of a run."""
        with self.context.scope(of_run=True) as scope:
            with self.context.registers_in(scope):
                added = self.attach(names, fn, dir, **how)
            try:
                yield
            finally:
                self.detach(added)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        of_run: bool = False,
    ) -> Iterator[None]:
        """As `HookedMLLM.hooks`; with `of_run`, runs that hooks start inside of a run are excluded."""
        hooks = [*_pairs("fwd", fwd_hooks), *_pairs("bwd", bwd_hooks)]
        added: list[tuple[HookPoint, Handle]] = []
        with self.context.scope(of_run) as scope:
            try:
                with self.context.registers_in(scope if reset_hooks_end else None):
                    for names, fn, direction in hooks:
                        added += self.attach(names, fn, direction)
                yield
            finally:
                if reset_hooks_end:
                    self.detach(added)
                if clear_contexts:
                    self.clear_contexts()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Directions = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove all hooks except permanent ones.

        Args:
            clear_contexts: Empty the points' contexts, too.
            direction: Only hooks on activations ("fwd"), on gradients ("bwd"), or "both".
            including_permanent: Remove permanent hooks, too.
            level: Remove only hooks of this level.
        """
        for point in self.hook_dict.values():
            if point.registered:
                point.remove_hooks(direction, including_permanent, level)
        if clear_contexts:
            self.clear_contexts()

    def clear_contexts(self) -> None:
        """Empty every point's `ctx`."""
        for point in self.hook_dict.values():
            if point.ctx:
                point.clear_context()


def _pairs(direction: Direction, hooks: HookList) -> Iterator[tuple[NameFilter, HookFunction, Direction]]:
    """Names, function and direction of each of `hooks`, which must be pairs of names and a function."""
    for pair in hooks:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or not callable(pair[1]):
            raise HookValueError(
                f"{direction}_hooks is a list of pairs (names, function), such as [('blocks.2.attn.hook_z', fn)]; got "
                f"{pair!r} in it."
            )
        yield (*pair, direction)
