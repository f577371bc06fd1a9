"""HookPoint: one named place on the data path, and the functions that a user hangs there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hooked_mllm.errors import HookValueError

Direction = Literal["fwd", "bwd"]


class HookFunction(Protocol):
    """A function of the activation and its hook point: None keeps the activation, a tensor replaces it."""

    def __call__(self, activation: Tensor, /, *, hook: "HookPoint") -> Any:
        """None to leave the activation, or a tensor in its place."""
        ...


@dataclass(eq=False)
class Handle:
    """One function hung on one point. Identity is what counts: the same function may hang there twice."""

    fn: Callable[..., Any]
    dir: Direction
    permanent: bool = False
    level: int | None = None
    #: promises not to change the activation: no copy is made for it and no slower path is taken
    reads_only: bool = False
    #: the intervention that hung it
    owner: Any = None


class Clock:
    """Where the model is in a generation: shared by all hook points of a model."""

    def __init__(self) -> None:
        #: calls of the model in this generation, less one; -1 before the first, when images may be encoded already
        self.calls = 0

    @property
    def step(self) -> int:
        """0 in the prefill or outside a generation, n in the n-th decoding step."""
        return max(self.calls, 0)


class HookPoint:
    """A named place on the data path of the model. Edits made here reach everything behind it.

    A hook is called as `fn(activation, hook=point)`. Returning None leaves the activation (an edit in place counts),
    returning a tensor of the same shape, dtype and device replaces it.

    Attributes:
        name: The hook's name, such as `blocks.3.attn.hook_z`.
        tower: "text", "vision" or "projector".
        ctx: A dictionary for the hooks' own use, kept between runs until it is cleared.

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
        tower: str,
        block: int | None,
        clock: Clock | None = None,
        on_change: Callable[["HookPoint"], None] | None = None,
    ) -> None:
        self.name = name
        self.tower = tower
        self.ctx: dict[Any, Any] = {}
        self._block = block
        self._clock = clock or Clock()
        self._on_change = on_change
        self._handles: list[Handle] = []

    def __repr__(self) -> str:
        fwd, bwd = (sum(h.dir == d for h in self._handles) for d in ("fwd", "bwd"))
        return f"HookPoint({self.name!r}, fwd_hooks={fwd}, bwd_hooks={bwd})"

    def layer(self) -> int:
        """The block this point belongs to, in its own tower (`blocks.3...` and `vision.blocks.3...` both give 3).

        Raises:
            HookValueError: when the point belongs to no block.
        """
        if self._block is None:
            raise HookValueError(f"{self.name} belongs to no block: it has no layer.")
        return self._block

    @property
    def step(self) -> int:
        """0 in the prefill (or a plain forward), n in the n-th decoding step of `generate`."""
        return self._clock.step

    # -- adding and removing ---------------------------------------------------------------------------------------

    def add_hook(
        self,
        fn: Callable[..., Any],
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        reads_only: bool = False,
    ) -> Handle:
        """Hang `fn` here.

        Args:
            fn: Called as `fn(activation, hook=self)`, or with the gradient for `dir="bwd"`.
            dir: "fwd" for the activation, "bwd" for its gradient.
            is_permanent: Survives everything but `reset_hooks(including_permanent=True)`.
            level: A number by which groups of hooks can be removed together.
            prepend: Run before the hooks that hang here already.
            reads_only: A promise that `fn` does not edit the activation.

        Raises:
            HookValueError: for a `dir` that is neither.
        """
        if dir not in ("fwd", "bwd"):
            raise HookValueError(f"dir must be 'fwd' or 'bwd', got {dir!r}.")
        if not callable(fn):
            raise HookValueError(f"A hook must be callable, got {type(fn).__name__} for {self.name}.")
        handle = Handle(fn, dir, is_permanent, level, reads_only)
        self._handles.insert(0, handle) if prepend else self._handles.append(handle)
        try:
            self._changed()
        except BaseException:
            self._handles.remove(handle)
            raise
        return handle

    def add_perma_hook(self, fn: Callable[..., Any], dir: Direction = "fwd") -> Handle:
        """Hang `fn` here for good: `reset_hooks` leaves it unless told otherwise."""
        return self.add_hook(fn, dir, is_permanent=True)

    def remove(self, handle: Handle) -> None:
        """Take one hook away; one that is gone already is no error."""
        if handle in self._handles:
            self._handles.remove(handle)
            self._changed()

    def remove_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "fwd",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take away the hooks of one direction, or both, or only those of one level."""
        if dir not in ("fwd", "bwd", "both"):
            raise HookValueError(f"dir must be 'fwd', 'bwd' or 'both', got {dir!r}.")
        self._handles = [
            h
            for h in self._handles
            if (dir not in ("both", h.dir))
            or (h.permanent and not including_permanent)
            or (level is not None and h.level != level)
        ]
        self._changed()

    def clear_context(self) -> None:
        """Empty `ctx`."""
        self.ctx = {}

    def has_hooks(
        self,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
        level: int | None = None,
    ) -> bool:
        """Whether a hook hangs here."""
        return any(
            (dir in ("both", h.dir))
            and (including_permanent or not h.permanent)
            and (level is None or h.level == level)
            for h in self._handles
        )

    @property
    def fwd_hooks(self) -> list[Handle]:
        """The hooks on the activation, in the order in which they run."""
        return [h for h in self._handles if h.dir == "fwd"]

    @property
    def bwd_hooks(self) -> list[Handle]:
        """The hooks on the gradient, in the order in which they run."""
        return [h for h in self._handles if h.dir == "bwd"]

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change(self)

    # -- the data path ---------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether anything hangs here."""
        return bool(self._handles)

    @property
    def may_edit(self) -> bool:
        """Whether a hook here could change the activation or needs it on the graph."""
        return any(not h.reads_only for h in self._handles)

    def run(self, value: Tensor) -> tuple[Tensor, bool]:
        """Pass an activation through the hooks.

        Returns:
            The activation and whether the caller must put it (back) on the data path.
        """
        edited = False
        if value.requires_grad and torch.is_grad_enabled() and any(not h.reads_only for h in self.fwd_hooks):
            # autograd may have saved this very tensor: an edit in place would spoil the backward pass
            value = value.clone()
        for handle in tuple(self._handles):
            if handle.dir == "bwd":
                continue
            version = _version(value)
            before = value.clone() if version is None and not handle.reads_only else None
            result = handle.fn(value, hook=self)
            if result is not None and result is not value:
                self._check(result, value)
                value, edited = result, True
            elif version is not None:
                edited |= version != _version(value)
            elif before is not None:
                edited |= not torch.equal(before, value)
        backward = self.bwd_hooks
        if backward and torch.is_grad_enabled() and value.is_floating_point():
            value, edited = self._watch_gradient(value, backward), True
        return value, edited

    def _watch_gradient(self, value: Tensor, handles: list[Handle]) -> Tensor:
        # A copy of its own, so that what is put back on the path is neither a view nor shared with what came in.
        value = value.clone()
        if not value.requires_grad:
            value.requires_grad_(True)
        for handle in handles:

            def on_gradient(gradient: Tensor, handle: Handle = handle) -> Any:
                result = handle.fn(gradient, hook=self)
                if isinstance(result, tuple) and len(result) == 1:
                    result = result[0]
                if result is not None:
                    self._check(result, gradient)
                return result

            value.register_hook(on_gradient)
        return value

    def _check(self, result: Any, value: Tensor) -> None:
        if not isinstance(result, Tensor):
            raise HookValueError(
                f"A hook on {self.name} returned {type(result).__name__}; expected None or a tensor of shape "
                f"{tuple(value.shape)}."
            )
        for what, got, due in (
            ("shape", tuple(result.shape), tuple(value.shape)),
            ("dtype", result.dtype, value.dtype),
            ("device", result.device, value.device),
        ):
            if got != due:
                raise HookValueError(
                    f"A hook on {self.name} returned {what} {got}; expected {due}. Return a tensor like the one "
                    "received (`.to(activation)` fixes dtype and device), or None to leave the activation as it is."
                )


def _version(tensor: Tensor) -> int | None:
    """The tensor's in-place counter; None under inference mode, which keeps none."""
    return None if tensor.is_inference() else tensor._version
