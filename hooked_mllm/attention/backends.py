"""Attention backends, and the hooked variants of transformers' attention implementations, `hooked_mllm_<name>`.

A tower is switched to its hooked variant only while a hook, tap or backend is active there.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeGuard, runtime_checkable
from weakref import ReferenceType, WeakKeyDictionary, WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hooked_mllm.attention.masks import MaskRows, with_recipe
from hooked_mllm.errors import UnsupportedModelError
from hooked_mllm.hooks.run_context import RunContext, Scope

PREFIX = "hooked_mllm_"
#: transformers passes all images of a packed vision tower in one call if the implementation's name contains this
PACKED_SUFFIX = "_flash_packed"

#: in the name of the hooked variant of an implementation whose padded masks are `[batch key]`, as flash attention's
SLIM = "slim_"
#: implementations whose own masks have an entry for every query and key
WIDE = ("sdpa", "eager")

#: the sites that replace the implementation of an attention module; weak references, so that a deleted model is freed.
#: More than one where a model was wrapped again after its family was registered again.
SITES: "WeakKeyDictionary[nn.Module, list[ReferenceType[Site]]]" = WeakKeyDictionary()


@runtime_checkable
class Site(Protocol):
    """Runs attention in place of a module's implementation."""

    #: whether a hook, tap or backend is active there
    in_use: bool

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The attention function that transformers calls."""
        ...


def add_site(module: nn.Module, site: Site) -> None:
    """Make the hooked variant of a module run this site, unless an earlier one is in use and this one is not."""
    SITES[module] = [known for known in SITES.get(module, []) if known() is not None] + [ref(site)]


@runtime_checkable
class AttentionBackend(Protocol):
    """A user's own attention: q, k, v after position encoding in, z out.

    Shapes: q `[batch head query d_head]`, k, v `[batch kv_head key d_head]`, z `[batch query head d_head]`.
    `mask.rows(index)` gives the rows of the model's mask. A query without a visible key (padding) needs z = 0.

    A backend whose heads see fewer keys than the mask needs `restrict`; without it, patterns and metrics are silently
    those of the full mask. A backend may also have any of these:

    - `restrict(q, k, mask, scale, layer) -> MaskRows`: the keys that its heads see. Patterns and metrics are computed
      under this mask, which the call also receives; where it is `mask` itself, the model's own attention runs.
    - `validate(n_layers, n_heads, causal)`, which raises if the backend does not fit a tower.
    - `describe() -> dict` of JSON-able values, which results keep.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskRows, scale: float, layer: int) -> Tensor:
        """The attention of one layer."""
        ...


def restricts(backend: AttentionBackend | None) -> TypeGuard["RestrictingBackend"]:
    """Whether a backend restricts the mask of its heads."""
    return hasattr(backend, "restrict")


class RestrictingBackend(AttentionBackend, Protocol):
    """A backend that restricts the mask of its heads."""

    def restrict(self, q: Tensor, k: Tensor, mask: MaskRows, scale: float, layer: int) -> MaskRows:
        """The mask of one call as its heads see it; `mask` itself to leave the call to the model's own attention."""
        ...


def _dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    sites = [site for known in SITES.get(module, []) if (site := known()) is not None]
    if not sites:
        raise UnsupportedModelError(
            f"{type(module).__name__} runs under a '{PREFIX}...' attention implementation without belonging to a "
            "HookedMLLM. Load the model with a transformers implementation such as 'sdpa' and wrap it with "
            "HookedMLLM.from_model."
        )
    return next((site for site in reversed(sites) if site.in_use), sites[-1])(*args, **kwargs)


def _full_mask(base: str, **arguments: Any) -> Any:
    return with_recipe(ALL_MASK_ATTENTION_FUNCTIONS[base](**arguments), **arguments)


def slim_mask(base: str = "sdpa") -> Callable[..., Any]:
    """A mask function that returns a causal prompt's padding as `[batch key]`, None without padding, never N x N.

    The width is the number of tokens so far, also with unused slots in the KV cache. One query, other rules: `base`.
    """

    def mask(**arguments: Any) -> Any:
        q_length, padding = arguments["q_length"], arguments.get("attention_mask")
        rule = arguments.get("mask_function", causal_mask_function)
        if q_length == 1 or rule is not causal_mask_function or arguments.get("kv_offset"):
            return _full_mask(base, **arguments)
        offset = int(arguments.get("q_offset") or 0)
        if padding is not None:
            padding = padding[:, : offset + q_length].bool()
            if not torch.compiler.is_compiling() and bool(padding.all()):  # a compiled graph cannot branch on data
                padding = None
        if padding is None and not offset and base != "eager":  # which takes None for "everything is seen"
            return None
        if padding is None:
            shape = (arguments["batch_size"], offset + q_length)
            padding = torch.ones(shape, dtype=torch.bool, device=arguments.get("device", "cpu"))
        return with_recipe(padding, **{**arguments, "attention_mask": padding})

    return mask


def hooked_name(base: str, packed: bool = False, slim: bool = False) -> str:
    """The name of the hooked variant of an implementation, registered on first use; `slim`: see `slim_mask`."""
    slim = slim and base in WIDE
    name = PREFIX + (SLIM if slim else "") + base + (PACKED_SUFFIX if packed and "flash" not in base else "")
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _dispatch)
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, slim_mask(base) if slim else partial(_full_mask, base))
    return name


def widened(mask: MaskRows, base: str, dtype: torch.dtype) -> Tensor:
    """A mask in the form that `base` takes: boolean `[batch 1 query key]`, additive for eager attention."""
    visible = mask.full()[:, None]
    if base != "eager":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def is_known(base: str) -> bool:
    """Whether transformers has an attention implementation of that name."""
    return base == "eager" or base in ALL_ATTENTION_FUNCTIONS


def implementation(module: nn.Module, base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that `module` would call under `base`: for "eager", the one of its own modelling file."""
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)


@dataclass(eq=False)
class _ActiveSwitches:
    """Number of switches that need the hooked variant of a configuration; the reference keeps its id unique."""

    config: Any
    count: int = 0


#: by the id of the configuration, which several models may share; an entry is freed with its last switch
_ACTIVE_SWITCHES: "WeakValueDictionary[int, _ActiveSwitches]" = WeakValueDictionary()


@dataclass(eq=False)
class Choice:
    """An implementation or a backend, and where it is active."""

    base: str | None
    backend: AttentionBackend | None
    scope: Scope | None


class TowerSwitch:
    """Switches one tower, whose layers share a configuration, between its implementation and the hooked variant."""

    def __init__(self, config: Any, packed: bool, context: RunContext | None = None) -> None:
        self.config = config
        self.packed = packed
        self.context = context or RunContext()
        self.sites: list[ReferenceType[Any]] = []
        self.users = 0
        self._slim = False
        #: what threads and tasks have chosen, the latest last
        self._choices: list[Choice] = []
        #: the implementation where none is chosen, and the one that was set last
        self._own = self._last = self.base
        self._active = _ACTIVE_SWITCHES.setdefault(id(config), _ActiveSwitches(config))

    def _set(self, base: str) -> None:
        hooked, self._last = self._active.count > 0, base
        if not self._choices:
            self._own = base
        self.config._attn_implementation = hooked_name(base, self.packed, self._slim) if hooked else base

    @property
    def base(self) -> str:
        """The implementation that the model itself runs."""
        current = self.config._attn_implementation or "eager"
        if not current.startswith(PREFIX):
            return current
        return current.removeprefix(PREFIX).removeprefix(SLIM).removesuffix(PACKED_SUFFIX)

    def take(self) -> None:
        """Count one more user; the hooked variant is active from the first on."""
        if self.users == 0:
            self._active.count += 1
            self._set(self.base)
        self.users += 1

    def give_back(self) -> None:
        """Count one user less; the last restores the model's own implementation. No effect without users."""
        if self.users == 0:
            return
        self.users -= 1
        if self.users == 0:
            self._active.count -= 1
            self._set(self.base)

    # -- choices -----------------------------------------------------------------------------------------------------

    @property
    def has_backend(self) -> bool:
        """Whether any thread or task has chosen a backend."""
        return any(choice.backend is not None for choice in self._choices)

    @property
    def n_choices(self) -> int:
        """Number of choices of all threads and tasks."""
        return len(self._choices)

    @property
    def lasting(self) -> list[AttentionBackend]:
        """The backends that were chosen for every run, not for a `with`."""
        return [choice.backend for choice in self._choices if choice.scope is None and choice.backend is not None]

    @property
    def chosen(self) -> bool:
        """Whether a choice is active in this thread and task."""
        return any(self.context.sees(choice.scope) for choice in self._choices)

    @property
    def backend(self) -> AttentionBackend | None:
        """The backend that is active in this thread and task; None for the implementation of `base`."""
        if not self._choices:
            return None
        return next((c.backend for c in reversed(self._choices) if self.context.sees(c.scope)), None)

    @property
    def chosen_base(self) -> str:
        """The implementation that is active in this thread and task."""
        names = (c.base for c in reversed(self._choices) if c.base is not None and self.context.sees(c.scope))
        return next(names, self._own)

    def choose(self, base: str | None, backend: AttentionBackend | None) -> Choice:
        """Run another implementation or backend, here or, while a scope is being registered in, in that scope."""
        with self.context.lock:
            choice = Choice(base, backend, self.context.registering)
            self._choices.append(choice)
            self._apply()
        return choice

    def withdraw(self, choice: Choice) -> None:
        """Undo `choose`; in any order."""
        with self.context.lock:
            self._choices = [c for c in self._choices if c is not choice]
            self._apply()

    def _apply(self) -> None:
        """Switch to what is active here."""
        if self.base != self._last:  # the user has set another
            self._own = self.base
        self._slim = restricts(self.backend)
        for site in (reference() for reference in self.sites):
            if site is not None:
                site.refresh()
        self._set(self.chosen_base)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run what is active in this thread and task, in the body of a `with`."""
        if not self._choices:
            yield
            return
        before = self._slim, self.base
        try:
            self._apply()
            yield
        finally:
            self._slim = before[0]
            self._set(before[1])

    def release(self) -> None:
        """Drop all users."""
        if self.users:
            self.users = 1
            self.give_back()
