"""HookPoint: one named activation of the model, and the hooks that are registered on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from hooked_mllm.errors import HookValueError
from hooked_mllm.hooks.run_context import RunContext, Scope
from hooked_mllm.hooks.table import TowerName

Direction = Literal["fwd", "bwd"]
Directions = Literal["fwd", "bwd", "both"]


@runtime_checkable
class HookFunction(Protocol):
    """A function of an activation and its hook point: None keeps the activation, a tensor replaces it."""

    def __call__(self, activation: Tensor, /, *, hook: "HookPoint") -> Tensor | None:
        """None to keep the activation, or a tensor that replaces it."""
        ...


@dataclass(eq=False)
class Handle:
    """One hook on one point. Handles compare by identity: a function may be registered on a point twice."""

    fn: HookFunction
    dir: Direction
    permanent: bool = False
    level: int | None = None
    #: the hook does not change the activation: nothing is copied for it and the fast attention is kept
    reads_only: bool = False
    #: the intervention that registered it
    owner: object = None
    #: where it is active; None for every run
    scope: Scope | None = None

    def fits(self, dir: Directions, including_permanent: bool, level: int | None = None) -> bool:
        """Whether the hook is of this direction, permanence and level."""
        return dir in ("both", self.dir) and (including_permanent or not self.permanent) and level in (None, self.level)


class HookPoint:
    """A named activation of the model. An edit reaches every later computation that uses the activation.

    A hook is called as `fn(activation, hook=point)`. If it returns None, the activation stays (with edits made in
    place); a tensor of the same shape, dtype and device replaces it.

    Attributes:
        name: The name, such as `blocks.3.attn.hook_z`.
        tower: "text", "vision" or "projector".
        ctx: A dictionary for the use of hooks, kept between runs until it is cleared.

    Examples:
        >>> from hooked_mllm import HookedMLLM
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> model.hook_dict["blocks.3.attn.hook_z"].layer()
        3
    """

    def __init__(
        self,
        name: str,
        *,
        tower: TowerName,
        block: int | None,
        context: RunContext | None = None,
        on_change: Callable[["HookPoint"], None] | None = None,
    ) -> None:
        self.name = name
        self.tower: TowerName = tower
        self.ctx: dict[Any, Any] = {}
        self._block, self._on_change = block, on_change
        self.context = context or RunContext()
        #: those of all threads; replaced at every change, so that a run in progress keeps its own
        self._handles: tuple[Handle, ...] = ()
        #: whether the activation that hooks get is memory that the model continues from, not a copy
        self.live = False

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r}, fwd_hooks={len(self.fwd_hooks)}, bwd_hooks={len(self.bwd_hooks)})"

    @property
    def block(self) -> int | None:
        """The index of the block in its tower; None outside of the blocks."""
        return self._block

    def layer(self) -> int:
        """The index of the block in its tower: 3 for `blocks.3...` and for `vision.blocks.3...`.

        Raises:
            HookValueError: If the point is outside of the blocks.
        """
        if self._block is None:
            raise HookValueError(f"{self.name} belongs to no block, so it has no layer.")
        return self._block

    @property
    def step(self) -> int:
        """0 in the prefill (or a plain forward), n in the n-th decoding step of `generate`."""
        return self.context.step

    # -- adding and removing ---------------------------------------------------------------------------------------

    def add_hook(
        self,
        fn: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        reads_only: bool = False,
    ) -> Handle:
        """Register a hook.

        Args:
            fn: Called as `fn(activation, hook=self)`; with the gradient if `dir` is "bwd".
            dir: "fwd" for the activation, "bwd" for its gradient.
            is_permanent: Only `reset_hooks(including_permanent=True)` removes the hook.
            level: A number by which a group of hooks can be removed.
            prepend: Run it before the hooks that are registered already.
            reads_only: `fn` never edits the activation.

        Returns:
            The handle by which `remove` removes the hook.

        Raises:
            HookValueError: If `dir` is another text, or `fn` is not callable.
        """
        if dir not in ("fwd", "bwd"):
            raise HookValueError(f"dir must be 'fwd' or 'bwd', got {dir!r}.")
        if not callable(fn):
            raise HookValueError(
                f"A hook must be callable, got {type(fn).__name__} for {self.name}: pass a function of the activation "
                "with a keyword argument `hook`."
            )
        handle = Handle(fn, dir, is_permanent, level, reads_only, scope=self.context.registering)
        with self.context.lock:  # never while another thread runs the model
            before = self._handles
            try:
                self._replace((handle, *before) if prepend else (*before, handle))
            except BaseException:
                self._handles = before
                raise
        return handle

    def add_perma_hook(self, fn: HookFunction, dir: Direction = "fwd") -> Handle:
        """Register a permanent hook; only `reset_hooks(including_permanent=True)` removes it."""
        return self.add_hook(fn, dir, is_permanent=True)

    def remove(self, handle: Handle) -> None:
        """Remove one hook; a hook that was removed before is ignored."""
        with self.context.lock:
            if handle in self._handles:
                self._replace(tuple(h for h in self._handles if h is not handle))

    def remove_hooks(
        self, dir: Directions = "fwd", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove the hooks of one direction or both.

        Args:
            dir: "fwd", "bwd" or "both".
            including_permanent: Remove permanent hooks, too.
            level: Remove only hooks of this level.

        Raises:
            HookValueError: If `dir` is another text.
        """
        if dir not in ("fwd", "bwd", "both"):
            raise HookValueError(f"dir must be 'fwd', 'bwd' or 'both', got {dir!r}.")
        with self.context.lock:
            removed = [h for h in self.handles if h.fits(dir, including_permanent, level)]
            self._replace(tuple(h for h in self._handles if h not in removed))

    def clear_context(self) -> None:
        """Empty `ctx`."""
        self.ctx = {}

    def has_hooks(self, dir: Directions = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """Whether a hook is registered, of that direction, permanence and level."""
        return any(h.fits(dir, including_permanent, level) for h in self.handles)

    @property
    def fwd_hooks(self) -> list[Handle]:
        """The hooks on the activation, in the order in which they run."""
        return [h for h in self.handles if h.dir == "fwd"]

    @property
    def bwd_hooks(self) -> list[Handle]:
        """The hooks on the gradient, in the order in which they run."""
        return [h for h in self.handles if h.dir == "bwd"]

    def _replace(self, handles: tuple[Handle, ...]) -> None:
        self._handles = handles
        if self._on_change is not None:
            self._on_change(self)

    # -- the data path ---------------------------------------------------------------------------------------------

    @property
    def handles(self) -> tuple[Handle, ...]:
        """The hooks that are active in this thread, task and run."""
        if not self._handles:
            return ()
        recorded, sees = self.context.recorded, self.context.sees
        if recorded is not None:
            return recorded.get(self.name, ())
        return tuple(h for h in self._handles if sees(h.scope))

    @property
    def all_handles(self) -> tuple[Handle, ...]:
        """The hooks of all threads, tasks and runs."""
        return self._handles

    @property
    def registered(self) -> bool:
        """Whether any hook is registered, here or in another thread."""
        return bool(self._handles)

    @property
    def active(self) -> bool:
        """Whether any hook is active here."""
        return bool(self._handles) and bool(self.handles)

    @property
    def may_edit(self) -> bool:
        """Whether a hook may change the activation or needs its gradient."""
        return any(not h.reads_only for h in self.handles)

    def run(self, value: Tensor) -> tuple[Tensor, bool]:
        """Run the hooks on an activation; returns it, and whether the caller must write it to the model."""
        edited, own, run, handles = False, self.live, self.context.run, self.handles
        if run is not None:
            run.fired.add(self.name)
        fwd_hooks = [h for h in handles if h.dir == "fwd"]
        if value.requires_grad and torch.is_grad_enabled() and any(not h.reads_only for h in fwd_hooks):
            # autograd may have saved this tensor: an edit in place would break the backward pass
            value, own = value.clone(), False
        for handle in fwd_hooks:
            version = None if value.is_inference() else value._version
            # autograd's counter misses edits through `.data` and NumPy; in live memory they need no writing back
            before = None if own or edited or handle.reads_only else value.detach().clone()
            shape, dtype, address = value.shape, value.dtype, value.data_ptr()
            result = handle.fn(value, hook=self)
            if value.shape != shape or value.dtype != dtype:  # `transpose_`, `x.data = other`
                raise self._misfit("changed in place", "shape and dtype", (value.shape, value.dtype), (shape, dtype))
            if result is not None and result is not value:
                value, edited, own = self._checked(result, value), True, False
            elif value.data_ptr() != address:  # `x.data = other`: no longer the memory that the model continues from
                edited, own = True, False
            elif version is not None and version != value._version:
                edited = True
            elif before is not None:
                edited |= not torch.equal(before, value)
        bwd_hooks = [h for h in handles if h.dir == "bwd"]
        if bwd_hooks and torch.is_grad_enabled() and value.is_floating_point():
            value, edited = self._with_gradient_hooks(value, bwd_hooks), True
        return value, edited

    def _with_gradient_hooks(self, value: Tensor, handles: list[Handle]) -> Tensor:
        # a copy: the tensor that carries the gradient hooks must be no view of another
        value = value.clone()
        if not value.requires_grad:
            value.requires_grad_(True)
        for handle in handles:

            def on_gradient(gradient: Tensor, handle: Handle = handle) -> Tensor | None:
                result: object = handle.fn(gradient, hook=self)
                if isinstance(result, tuple) and len(result) == 1:
                    result = result[0]  # the form that TransformerLens accepts
                return None if result is None else self._checked(result, gradient)

            value.register_hook(on_gradient)
        return value

    def _checked(self, result: object, value: Tensor) -> Tensor:
        """What a hook returned, if it is a tensor of the shape, dtype and device of `value`."""
        if not isinstance(result, Tensor):
            raise HookValueError(
                f"A hook on {self.name} returned {type(result).__name__}; expected None or a tensor of shape "
                f"{tuple(value.shape)}."
            )
        for quantity, actual, expected in (
            ("shape", tuple(result.shape), tuple(value.shape)),
            ("dtype", result.dtype, value.dtype),
            ("device", result.device, value.device),
        ):
            if actual != expected:
                raise self._misfit("returned", quantity, actual, expected)
        return result

    def _misfit(self, how: str, quantity: str, actual: object, expected: object) -> HookValueError:
        return HookValueError(
            f"A hook on {self.name} {how} {quantity} {actual}; expected {expected}. Return a tensor like the one "
            "received (`.to(activation)` sets dtype and device), or None to keep the activation."
        )
