"""The hook points of a model by name: looking them up, hanging functions on them, taking them off again."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from hooked_mllm.errors import HookNameError, HookValueError, nearest
from hooked_mllm.hooks.point import Clock, Direction, Handle, HookPoint

#: a hook name, a glob ("blocks.*.attn.hook_z"), a compiled regular expression, a predicate on names, or several of
#: these
NameFilter = str | re.Pattern[str] | Callable[[str], bool] | Iterable[Any] | None
#: what `run_with_hooks` takes: pairs of a name filter and a hook function
HookList = Sequence[tuple[Any, Callable[..., Any]]]


class HookRegistry:
    """All hook points of one model, in the order in which a forward pass meets them.

    Args:
        family: The family's name, for messages.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.clock = Clock()
        #: the inputs of the run that goes on, for hooks that need to know which position is what; None between runs
        self.running: Any = None
        #: the position of the first row of text activations: above 0 where only the end of a sequence is run again
        self.first = 0
        self.hook_dict: dict[str, HookPoint] = {}

    def add(self, point: HookPoint) -> HookPoint:
        """Make a point known."""
        self.hook_dict[point.name] = point
        return point

    @contextmanager
    def running_on(self, inputs: Any, first: int = 0) -> Iterator[None]:
        """Within it, hooks find `inputs` in `running`, and rows of activations begin at position `first`."""
        before, self.running, self.first = (self.running, self.first), inputs, first
        try:
            yield
        finally:
            self.running, self.first = before

    # -- looking up ------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> HookPoint:
        if name not in self.hook_dict:
            short = [*self.select_short(name)]
            meant = (
                f"Short names are keys of a cache; of all layers the points are '*hook_{name}', of one {short[0]!r}."
                if short
                else nearest(name, self.hook_dict)
            )
            raise HookNameError(
                f"{self.family} has no hook point {name!r}. {meant} `model.hook_dict` lists all of them."
            )
        return self.hook_dict[name]

    def select_short(self, name: str) -> list[str]:
        """The points that end in a cache's short name, such as "z"."""
        return [full for full in self.hook_dict if full.endswith(f".hook_{name}")]

    def select(self, names: NameFilter) -> list[HookPoint]:
        """The points that a name filter means; each once, in the order of the forward pass.

        Args:
            names: None (all), a name, a glob, a compiled regular expression (searched in the name), a predicate, or an
                iterable of these.

        Raises:
            HookNameError: for a name that this model lacks, or a glob or expression that matches nothing.
                A predicate may match nothing.
        """
        if names is None:
            return list(self.hook_dict.values())
        chosen = {p.name for p in self._matches(names)}
        return [p for p in self.hook_dict.values() if p.name in chosen]

    def _matches(self, names: Any) -> list[HookPoint]:
        if isinstance(names, HookPoint):
            return [self[names.name]]
        if isinstance(names, str):
            if not any(c in names for c in "*?["):
                return [self[names]]
            found = [p for n, p in self.hook_dict.items() if fnmatch.fnmatchcase(n, names)]
        elif isinstance(names, re.Pattern):
            found = [p for n, p in self.hook_dict.items() if names.search(n)]
        elif callable(names):
            return [p for n, p in self.hook_dict.items() if names(n)]
        elif isinstance(names, Iterable):
            return [p for name in names for p in self._matches(name)]
        else:
            raise HookValueError(
                "A name filter is a hook name, a glob, a compiled regular expression, a predicate on names, or a "
                f"list of these; got {type(names).__name__}."
            )
        if not found:
            pattern = names if isinstance(names, str) else names.pattern
            raise HookNameError(
                f"No hook point of {self.family} matches {pattern!r}. {nearest(pattern, self.hook_dict)} "
                "`model.hook_dict` lists all of them."
            )
        return found

    def list_hooks(
        self,
        name_filter: NameFilter = None,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
    ) -> dict[str, list[Handle]]:
        """The hooks that hang now, by the name of their point."""
        found: dict[str, list[Handle]] = {}
        for point in self.select(name_filter):
            handles = [
                h
                for h in (*point.fwd_hooks, *point.bwd_hooks)
                if dir in ("both", h.dir) and (including_permanent or not h.permanent)
            ]
            if handles:
                found[point.name] = handles
        return found

    # -- adding and removing ---------------------------------------------------------------------------------------

    def attach(
        self, names: NameFilter, fn: Callable[..., Any], dir: Direction = "fwd", **how: Any
    ) -> list[tuple[HookPoint, Handle]]:
        """Hang `fn` on every point that `names` means; all of them or, on an error, none."""
        added: list[tuple[HookPoint, Handle]] = []
        try:
            for point in self.select(names):
                added.append((point, point.add_hook(fn, dir, **how)))
        except BaseException:
            self.detach(added)
            raise
        return added

    def detach(self, added: Iterable[tuple[HookPoint, Handle]]) -> None:
        """Take exactly these hooks away."""
        for point, handle in added:
            point.remove(handle)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Iterable[Any] = (),
        bwd_hooks: Iterable[Any] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[None]:
        """Hang hooks for the body of a `with`; on leaving, however it is left, exactly these are taken away."""
        fwd_hooks, bwd_hooks = list(fwd_hooks), list(bwd_hooks)
        for name, given in (("fwd_hooks", fwd_hooks), ("bwd_hooks", bwd_hooks)):
            for pair in given:
                if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 or not callable(pair[1]):
                    raise HookValueError(
                        f"{name} is a list of pairs (names, function), such as [('blocks.2.attn.hook_z', fn)]; got "
                        f"{pair!r} in it."
                    )
        added: list[tuple[HookPoint, Handle]] = []
        try:
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
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take all hooks away but the permanent ones."""
        for point in self.hook_dict.values():
            if point.active:
                point.remove_hooks(direction, including_permanent, level)
        if clear_contexts:
            self.clear_contexts()

    def clear_contexts(self) -> None:
        """Empty every point's `ctx`."""
        for point in self.hook_dict.values():
            if point.ctx:
                point.clear_context()
