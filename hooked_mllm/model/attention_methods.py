"""Which attention a model runs: an implementation of transformers, or a backend."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

from hooked_mllm.attention.backends import AttentionBackend, is_known
from hooked_mllm.attention.site import AttentionSite
from hooked_mllm.contracts import Tower
from hooked_mllm.errors import HookValueError, InputError
from hooked_mllm.families.config import HookedConfig
from hooked_mllm.wiring.model import Wiring

#: `attention=` of `from_pretrained`: a name, a backend, or either of them by tower
AttentionChoice: TypeAlias = str | AttentionBackend | Mapping[str, str | AttentionBackend]


class AttentionMethods:
    """Choosing the attention; a part of `HookedMLLM`."""

    wiring: Wiring
    cfg: HookedConfig

    def _sites(self, tower: str) -> list[AttentionSite]:
        return self.wiring.text if tower == "text" else self.wiring.vision

    def _fitting(self, backend: Any, tower: str) -> AttentionBackend:
        """A backend for a tower, checked against the tower's shape."""
        if isinstance(backend, type) or not callable(backend):
            raise HookValueError(f"Expected a name or a callable for the {tower} tower; got {backend!r}.")
        try:
            inspect.signature(backend).bind(*range(6))
        except (TypeError, ValueError) as error:  # ValueError: a builtin function, which has no signature
            expected = "Expected a backend that is called with (q, k, v, mask, scale, layer)"
            raise HookValueError(f"{expected}; got {backend!r}: {error}.") from None
        validate = getattr(backend, "validate", None)
        if validate is not None:
            text = (self.cfg.n_layers, self.cfg.n_heads)
            shape = text if tower == "text" else (self.cfg.vision_n_layers, self.cfg.vision_n_heads)
            validate(*shape, causal=self._sites(tower)[0].causal)
        return cast(AttentionBackend, backend)

    def _described_attention(self) -> tuple[str, dict[str, Any] | None]:
        """The name of the language model's attention, and the settings of a backend that describes itself."""
        base, backend = self.wiring.switches["text"].chosen_base, self.wiring.text[0].running
        if backend is None:
            return base, None
        describe = getattr(backend, "describe", None)
        name = str(backend) if describe else getattr(backend, "__name__", type(backend).__name__)
        name = f"{name.removesuffix(')')}; {base})" if name.endswith(")") else f"{name} over {base}"
        return name, describe() if describe else None

    @contextmanager
    def attention(self, implementation: str | AttentionBackend, tower: Tower = "text") -> Iterator[None]:
        """Run another attention in the body of a `with`; hooks and metrics work the same under each.

        Args:
            implementation: A name of transformers ("eager", "sdpa", ...), which also replaces a backend that is set;
                `HybridAttention(...)`; or a callable `(q, k, v, mask, scale, layer) -> z` (see `AttentionBackend`).
            tower: "text" or "vision".

        Raises:
            HookValueError: For an unknown name or tower.
            UnsupportedModelError: For a backend that does not fit the tower.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> with model.attention("eager"):
            ...     logits = model(sample)
        """
        if tower not in self.wiring.switches:
            raise HookValueError(f"tower is 'text' or 'vision'; got {tower!r}.")
        base, backend = None, None
        if not isinstance(implementation, str):
            backend = self._fitting(implementation, tower)
        elif is_known(implementation):
            base = implementation
        else:
            raise HookValueError(
                f"transformers has no attention implementation {implementation!r}; 'eager' and 'sdpa' are always "
                "available."
            )
        switch, context = self.wiring.switches[tower], self.wiring.registry.context
        with context.scope() as scope:
            with context.registers_in(scope):
                choice = switch.choose(base, backend)
            try:
                yield
            finally:
                switch.withdraw(choice)


def split_attention(
    attention: AttentionChoice | None,
) -> tuple[str | dict[str, str] | None, dict[str, AttentionBackend]]:
    """Split `attention=` into names, which transformers takes, and backends by tower."""
    if attention is None or isinstance(attention, str):
        return attention, {}
    if not isinstance(attention, Mapping):
        return None, {"text": attention}
    names = {tower: choice for tower, choice in attention.items() if isinstance(choice, str)}
    backends = {tower: choice for tower, choice in attention.items() if not isinstance(choice, str)}
    if set(backends) - {"text", "vision"}:
        raise InputError(f"attention= is for 'text', 'vision' or both; got {sorted(attention)}.")
    return names or None, backends
