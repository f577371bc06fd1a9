"""The hook methods of HookedMLLM: TransformerLens's names and behaviour over the model's registry of points."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, Literal, cast, overload

from torch import Tensor
from transformers.utils import ModelOutput

from hooked_mllm.contracts import Model
from hooked_mllm.hooks.point import Direction, Handle, HookFunction, HookPoint
from hooked_mllm.hooks.registry import HookList, HookRegistry, NameFilter
from hooked_mllm.inputs.resolve import RunInput
from hooked_mllm.interventions.base import intervening
from hooked_mllm.interventions.records import Records


class HookMethods:
    """Adding, running with, listing and removing hooks."""

    registry: HookRegistry
    forward: Callable[..., Any]

    # IPython evaluates no property when it completes `model.hook_dict[`; a type checker accepts no cached_property here
    hook_dict: dict[str, HookPoint] = cast(Any, cached_property(lambda self: self.registry.hook_dict))
    """Every hook point by name, in the order of the forward pass."""

    @property
    def mod_dict(self) -> dict[str, HookPoint]:
        """TransformerLens's other name of `hook_dict`."""
        return self.hook_dict

    def hook_points(self) -> list[HookPoint]:
        """Every hook point, in the order of the forward pass."""
        return list(self.registry.hook_dict.values())

    def add_hook(
        self,
        name: NameFilter,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Register a hook until it is reset.

        Args:
            name: A hook name, a glob, a compiled regular expression, a predicate on names, or a list of these.
            hook: Called as `hook(activation, hook=point)`; returns None, or a tensor that replaces the activation.
            dir: "fwd" for activations, "bwd" for gradients.
            is_permanent: Keep the hook on `reset_hooks`, unless it is called with `including_permanent=True`.
            level: A number by which groups of hooks can be removed together.
            prepend: Run before the hooks that are registered there already.

        Examples:
            >>> from hooked_mllm import HookedMLLM
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> model.add_hook("blocks.*.attn.hook_z", lambda z, hook: z * 0)
            >>> len(model.list_hooks()) == model.cfg.n_layers
            True
            >>> model.reset_hooks()
        """
        self.registry.attach(name, hook, dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def add_perma_hook(self, name: NameFilter, hook: HookFunction, dir: Direction = "fwd") -> None:
        """Register a hook that `reset_hooks` keeps, unless called with `including_permanent=True`."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove all hooks except permanent ones; the model then runs exactly as before."""
        self.registry.reset_hooks(clear_contexts, direction, including_permanent, level)

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks and keep the points' contexts."""
        self.registry.reset_hooks(False, direction, including_permanent, level)

    def list_hooks(
        self,
        name_filter: NameFilter = None,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
    ) -> dict[str, list[Handle]]:
        """The registered hooks, by the name of their point."""
        return self.registry.list_hooks(name_filter, dir, including_permanent)

    def hooks(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> AbstractContextManager[None]:
        """Register hooks for the body of a `with`; at its end, also after an error, exactly these are removed.

        Args:
            fwd_hooks: Pairs of a name filter and a hook on activations.
            bwd_hooks: Pairs of a name filter and a hook on gradients.
            reset_hooks_end: Remove them at the end.
            clear_contexts: Empty the points' contexts at the end.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> with model.hooks(fwd_hooks=[("blocks.2.attn.hook_z", lambda z, hook: z * 0)]):
            ...     tokens = model.generate(sample, max_new_tokens=1)
        """
        return self.registry.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts)

    def intervene(self, *interventions: Any) -> AbstractContextManager[Records]:
        """Intervene in the body of a `with`: in forward passes, and in every step of `generate`.

        At its end, also after an error or an interrupt, exactly these interventions are removed.

        Args:
            *interventions: Instances of `HeadAblation`, `HeadPatch`, `Steer`, ..., or your own; applied in this order.

        Yields:
            A record of each: its settings, and under "applied" the number of hook-point calls edited so far.

        Raises:
            HookValueError: For an object that is no intervention, or settings that do not fit this model.

        Examples:
            >>> from hooked_mllm import HeadAblation, HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> with model.intervene(HeadAblation(["L2H4"], mode="zero", phase="prefill")) as records:
            ...     logits = model(sample)
            >>> records[0]["heads"], records[0]["applied"]
            (['L2H4'], {'prefill': 1, 'decode': 0})
        """
        return intervening(cast(Model, self), interventions)

    @overload
    def run_with_hooks(
        self, inputs: RunInput, *, return_type: Literal["logits", "loss"] = "logits", **options: Any
    ) -> Tensor: ...

    @overload
    def run_with_hooks(
        self, inputs: RunInput, *, return_type: Literal["both"], **options: Any
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def run_with_hooks(self, inputs: RunInput, *, return_type: Literal["output"], **options: Any) -> ModelOutput: ...

    @overload
    def run_with_hooks(self, inputs: RunInput, *, return_type: None, stop_at_layer: int, **options: Any) -> Tensor: ...

    @overload
    def run_with_hooks(
        self, inputs: RunInput, *, return_type: None, stop_at_layer: None = None, **options: Any
    ) -> None: ...

    def run_with_hooks(
        self,
        inputs: RunInput,
        *,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **forward: Any,
    ) -> Tensor | tuple[Tensor, Tensor] | ModelOutput | None:
        """One forward pass with these hooks; a later `backward` of this pass calls those on gradients.

        Args:
            inputs: As for `forward`.
            fwd_hooks: As for `hooks`.
            bwd_hooks: As for `hooks`; they belong to the graph of this pass, and act after their removal.
            reset_hooks_end: As for `hooks`.
            clear_contexts: As for `hooks`.
            **forward: Passed to `forward`.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> def zero_head_4(z, hook):
            ...     z[:, :, 4] = 0
            >>> logits = model.run_with_hooks(sample, fwd_hooks=[("blocks.2.attn.hook_z", zero_head_4)])
        """
        with self.registry.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts, of_run=True):
            return self.forward(inputs, **forward)
