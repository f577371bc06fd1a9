"""The hook methods of HookedMLLM: TransformerLens's names and behaviour over the model's registry of points."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

from torch import Tensor

from hooked_mllm.hooks.point import Direction, Handle, HookPoint
from hooked_mllm.hooks.registry import HookList, HookRegistry, NameFilter
from hooked_mllm.interventions.base import intervening


class HookMethods:
    """Adding, running with, listing and removing hooks."""

    registry: HookRegistry
    forward: Callable[..., Tensor]

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by name, in the order of the forward pass."""
        return self.registry.hook_dict

    mod_dict = hook_dict

    def hook_points(self) -> list[HookPoint]:
        """Every hook point, in the order of the forward pass."""
        return list(self.registry.hook_dict.values())

    def add_hook(
        self,
        name: NameFilter,
        hook: Callable[..., Any],
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Hang a hook until it is reset.

        Args:
            name: A hook name, a glob, a compiled regular expression, a predicate on names, or a list of these.
            hook: Called as `hook(activation, hook=point)`; None leaves the activation, a tensor replaces it.
            dir: "fwd" for activations, "bwd" for gradients.
            is_permanent: Survive `reset_hooks` unless it is told `including_permanent=True`.
            level: A number by which groups of hooks can be removed together.
            prepend: Run before the hooks that hang there already.

        Raises:
            HookNameError: for a name that this model lacks; it lists the nearest ones.

        Examples:
            >>> from hooked_mllm import HookedMLLM
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> model.add_hook("blocks.*.attn.hook_z", lambda z, hook: z * 0)
            >>> len(model.list_hooks()) == model.cfg.n_layers
            True
            >>> model.reset_hooks()
        """
        self.registry.attach(name, hook, dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def add_perma_hook(self, name: NameFilter, hook: Callable[..., Any], dir: Direction = "fwd") -> None:
        """Hang a hook that `reset_hooks` leaves alone unless told otherwise."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take all hooks away but the permanent ones; the model is then exactly as it was."""
        self.registry.reset_hooks(clear_contexts, direction, including_permanent, level)

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take hooks away and leave the points' contexts."""
        self.registry.reset_hooks(False, direction, including_permanent, level)

    def list_hooks(
        self,
        name_filter: NameFilter = None,
        dir: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = True,
    ) -> dict[str, list[Handle]]:
        """The hooks that hang now, by the name of their point."""
        return self.registry.list_hooks(name_filter, dir, including_permanent)

    def hooks(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> AbstractContextManager[None]:
        """Hooks for the body of a `with`; on leaving, by an error too, exactly these are taken away.

        Args:
            fwd_hooks: Pairs of a name filter and a hook on activations.
            bwd_hooks: Pairs of a name filter and a hook on gradients.
            reset_hooks_end: Take them away at the end.
            clear_contexts: Empty the points' contexts at the end.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> with model.hooks(fwd_hooks=[("blocks.2.attn.hook_z", lambda z, hook: z * 0)]):
            ...     tokens = model.generate(sample, max_new_tokens=1)
        """
        return self.registry.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts)

    def intervene(self, *interventions: Any) -> AbstractContextManager[list[dict[str, Any]]]:
        """Intervene on the model for the body of a `with`: all are checked, hung in this order, and undone at the end.

        They nest and combine, act in forward passes and in every step of `generate`, and on leaving, by an error or an
        interrupt too, exactly what they hung is taken away.

        Args:
            *interventions: `HeadAblation`, `AttentionKnockout`, `HeadPatch`, `ActivationPatch`, `Steer`, or your own.

        Yields:
            A record of each: what it does, and under "applied" the calls of hook points edited so far.

        Raises:
            HookValueError: for something else, or settings that do not fit this model.
            HeadError: for heads that it lacks.
            HookNameError: for layers or sites that it lacks.

        Examples:
            >>> from hooked_mllm import HeadAblation, HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> with model.intervene(HeadAblation(["L2H4"], mode="zero", phase="prefill")) as records:
            ...     logits = model(sample)
            >>> records[0]["heads"], records[0]["mode"], records[0]["applied"]
            (['L2H4'], 'zero', {'prefill': 1, 'decode': 0})
        """
        return intervening(self, interventions)

    def run_with_hooks(
        self,
        inputs: Any,
        *,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **forward: Any,
    ) -> Tensor:
        """One forward pass with these hooks; backward hooks are kept until the caller's `backward` has run.

        Backward hooks act on the graph of this pass, so they work after it returns although their points no longer
        list them.

        Args:
            inputs: A sample, a batch, or a mapping of model inputs.
            fwd_hooks: Pairs of a name filter and a hook on activations.
            bwd_hooks: Pairs of a name filter and a hook on gradients.
            reset_hooks_end: Take the hooks away at the end.
            clear_contexts: Empty the points' contexts at the end.
            **forward: Passed to `forward`.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> def zero_head_4(z, hook):
            ...     z[:, :, 4] = 0
            >>> logits = model.run_with_hooks(sample, fwd_hooks=[("blocks.2.attn.hook_z", zero_head_4)])
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(inputs, **forward)
