"""The hook points of a model by name: look them up, register hooks on them, remove the hooks."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

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
        self.hook_dict: dict[str, HookPoint] = {}

    def add(self, point: HookPoint) -> HookPoint:
        """Add a point and return it."""
        self.hook_dict[point.name] = point
        return point

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
        """Start a run for the body of a `with` statement.

        Args:
            inputs: What hooks read from `running`.
            first: Position of the first row of text activations.
        """
        with self.context.running(Run(inputs, first=first)) as run, ExitStack() as stack:
            for enter in self.on_run:
                stack.enter_context(enter())
            yield run

    @property
    def in_use(self) -> bool:
        """Whether a hook is active here."""
        return any(point.active for point in self.hook_dict.values() if point.registered)

    # -- looking up ------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> HookPoint:
        if name not in self.hook_dict:
            full_names = self.select_short(name)
            hint = nearest(name, self.hook_dict)
            if full_names:
                hint = (
                    f"Short names are keys of a cache; of all layers the points are '*hook_{name}', of one "
                    f"{full_names[0]!r}."
                )
            raise HookNameError(
                f"{self.family} has no hook point {name!r}. {hint} `model.hook_dict` lists all of them."
            )
        return self.hook_dict[name]

    def select_short(self, name: str) -> list[str]:
        """Names of the points whose short name, as in keys of a cache, is `name`: "z", "resid_post"."""
        return [full for full in self.hook_dict if full.endswith(f".hook_{name}")]

    def select(self, names: NameFilter) -> list[HookPoint]:
        """The points that a name filter selects; each once, in the order of the forward pass.

        Args:
            names: None (all), a name, a glob, a compiled regular expression (searched in the name), a predicate, or an
                iterable of these.

        Raises:
            HookNameError: For a name that this model lacks, or a glob or expression without a match. A predicate may
                have no match.
            HookValueError: For a filter of another type.
        """
        if names is None:
            return list(self.hook_dict.values())
        selected_names = {p.name for p in self._matches(names)}
        return [p for p in self.hook_dict.values() if p.name in selected_names]

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
        elif isinstance(names, Iterable):
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
        self,
        name_filter: NameFilter = None,
        dir: Directions = "both",
        including_permanent: bool = True,
    ) -> dict[str, list[Handle]]:
        """The registered hooks, by the name of their point.

        Args:
            name_filter: Only points that it selects.
            dir: Only hooks on activations ("fwd"), on gradients ("bwd"), or "both".
            including_permanent: List permanent hooks, too.
        """
        handles_by_name: dict[str, list[Handle]] = {}
        for point in self.select(name_filter):
            handles = [
                h
                for h in (*point.fwd_hooks, *point.bwd_hooks)
                if dir in ("both", h.dir) and (including_permanent or not h.permanent)
            ]
            if handles:
                handles_by_name[point.name] = handles
        return handles_by_name

    # -- adding and removing ---------------------------------------------------------------------------------------

    def attach(
        self, names: NameFilter, fn: HookFunction, dir: Direction = "fwd", **how: Unpack[HookOptions]
    ) -> list[tuple[HookPoint, Handle]]:
        """Register a hook on every selected point; after an error on none of them.

        Args:
            names: Which points; see `select`.
            fn: The hook.
            dir: "fwd" for activations, "bwd" for their gradients.
            **how: Passed to `HookPoint.add_hook`.

        Returns:
            The points and handles, as `detach` takes them.

        Raises:
            HookNameError: For a name that this model lacks.
            HookValueError: For arguments that `HookPoint.add_hook` rejects.
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
    def hooks(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        of_run: bool = False,
    ) -> Iterator[None]:
        """Register hooks for the body of a `with` statement; at its end, by an error too, exactly these are removed.

        They are active in this thread and task alone.

        Args:
            fwd_hooks: Pairs of a name filter and a hook on activations.
            bwd_hooks: Pairs of a name filter and a hook on gradients.
            reset_hooks_end: Remove them at the end.
            clear_contexts: Empty the points' contexts at the end.
            of_run: Exclude runs that hooks start inside of a run.

        Raises:
            HookNameError: For a name that this model lacks.
            HookValueError: For hooks that are not pairs.
        """
        fwd_hooks, bwd_hooks = _pairs("fwd_hooks", fwd_hooks), _pairs("bwd_hooks", bwd_hooks)
        added: list[tuple[HookPoint, Handle]] = []
        with self.context.scope(of_run) as scope:
            try:
                with self.context.registers_in(scope if reset_hooks_end else None):
                    for names, fn in fwd_hooks:
                        added += self.attach(names, fn, "fwd")
                    for names, fn in bwd_hooks:
                        added += self.attach(names, fn, "bwd")
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


def _pairs(argument: str, hooks: HookList) -> list[tuple[NameFilter, HookFunction]]:
    """The hooks as a list.

    Raises:
        HookValueError: For an entry that is no pair of names and a function.
    """
    pairs = list(hooks)
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or not callable(pair[1]):
            raise HookValueError(
                f"{argument} is a list of pairs (names, function), such as [('blocks.2.attn.hook_z', fn)]; got "
                f"{pair!r} in it."
            )
    return pairs
