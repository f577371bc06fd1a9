"""Which attention a model runs: transformers' own, or a backend in its place."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from hooked_mllm.attention.backends import AttentionBackend, is_known, restricts
from hooked_mllm.errors import HookValueError, InputError
from hooked_mllm.families.config import HookedConfig
from hooked_mllm.wiring.model import Wiring


class AttentionMethods:
    """The part of `HookedMLLM` that chooses its attention."""

    wiring: Wiring
    cfg: HookedConfig

    def _sites(self, tower: str) -> list[Any]:
        return self.wiring.text if tower == "text" else self.wiring.vision

    def _set_backend(self, backend: AttentionBackend | None, tower: str) -> None:
        self.wiring.switches[tower].slim = restricts(backend)
        for site in self._sites(tower):
            site.backend = backend
            site.refresh()

    def _fitting(self, backend: Any, tower: str) -> AttentionBackend:
        """A backend that was given for a tower, checked."""
        if isinstance(backend, type) or not callable(backend):
            raise HookValueError(f"Expected a name or a callable for the {tower} tower; got {backend!r}.")
        fitting: Any = backend
        validate = getattr(fitting, "validate", None)
        if validate is not None:
            text = (self.cfg.n_layers, self.cfg.n_heads)
            shape = text if tower == "text" else (self.cfg.vision_n_layers, self.cfg.vision_n_heads)
            validate(*shape, causal=self._sites(tower)[0].causal)
        return fitting

    def _attention_name(self) -> str:
        base, backend = self.wiring.switches["text"].base, self.wiring.text[0].running
        if backend is None:
            return base
        own = str(backend) if hasattr(backend, "describe") else getattr(backend, "__name__", type(backend).__name__)
        return f"{own.removesuffix(')')}; {base})" if own.endswith(")") else f"{own} over {base}"

    def _attention_settings(self) -> dict[str, Any] | None:
        describe = getattr(self.wiring.text[0].running, "describe", None)
        return None if describe is None else describe()

    @contextmanager
    def attention(self, implementation: str | AttentionBackend, tower: str = "text") -> Iterator[None]:
        """Run another attention for the body of a `with`; hooks and metrics work the same under each.

        Args:
            implementation: A name of transformers' ("eager", "sdpa", ...), also in the place of a backend that is set;
                `HybridAttention(...)`; or a callable `(q, k, v, mask, scale, layer) -> z` (see `AttentionBackend`).
            tower: "text" or "vision".

        Raises:
            HookValueError: for an unknown name or tower.
            HeadError, UnsupportedModelError: for a backend that does not fit the model or the tower.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> with model.attention("eager"):
            ...     logits = model(sample)
        """
        if tower not in self.wiring.switches:
            raise HookValueError(f"tower is 'text' or 'vision'; got {tower!r}.")
        with ExitStack() as stack:
            if isinstance(implementation, str):
                if not is_known(implementation):
                    raise HookValueError(
                        f"transformers knows no attention implementation {implementation!r}; 'eager' and 'sdpa' are "
                        "always there."
                    )
                stack.enter_context(self.wiring.switches[tower].using(implementation))
            backend = None if isinstance(implementation, str) else self._fitting(implementation, tower)
            stack.callback(self._set_backend, self._sites(tower)[0].backend, tower)
            self._set_backend(backend, tower)
            yield


def split_attention(attention: Any) -> tuple[Any, dict[str, Any]]:
    """What was given as `attention=`: the names, which transformers takes, and the backends, by tower."""
    if attention is None or isinstance(attention, str):
        return attention, {}
    if not isinstance(attention, Mapping):
        return None, {"text": attention}
    backends = {tower: own for tower, own in attention.items() if not isinstance(own, str)}
    if set(backends) - {"text", "vision"}:
        raise InputError(f"attention= is for 'text', 'vision' or both; got {sorted(attention)}.")
    return {tower: name for tower, name in attention.items() if tower not in backends} or None, backends
