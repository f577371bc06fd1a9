"""The ways to run one model's attention that are timed side by side."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface

from hooked_mllm.attention.registered import register_hybrid_attention
from hooked_mllm.bench.choices import BACKENDS
from hooked_mllm.bench.compiled import CompiledBlocks, text_backbone
from hooked_mllm.errors import InputError, nearest
from hooked_mllm.heads import HeadSet
from hooked_mllm.kernels.implementations import Implementation
from hooked_mllm.kernels.streaming_window import WholeNumber, check_sink_and_window

#: the implementation that leaves attention out
REMOVED = "hooked_bench_removed"
_ON_GPU = ("cudnn", "flash", "hybrid", "cudnn-compiled", "hybrid-compiled", "removed", "removed-compiled")
_ON_CPU = ("sdpa", "hybrid", "removed")
_PINNED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


@dataclass(frozen=True)
class Variant:
    """One way to run the model.

    Attributes:
        name: Its key in the record.
        title: Its name in tables.
        attention: A name of transformers' attention interface.
        pinned: The one SDPA backend that may be used.
        compiled: Whether everything but attention is compiled.
        dense: The heads that must see everything; None for all of them.
        exact: Whether it computes attention at all: if not, its outputs are compared with nothing.
        sink: First keys that the other heads see.
        window: Last keys that the other heads see.
    """

    name: str
    title: str
    attention: str
    pinned: SDPBackend | None = None
    compiled: bool = False
    dense: HeadSet | None = None
    exact: bool = True
    sink: int = 64
    window: int = 1024

    @contextmanager
    def on(self, model: Any, compiled: CompiledBlocks | None = None) -> Iterator[None]:
        """Within it, the model runs this way.

        Args:
            model: A text decoder.
            compiled: Its compiled blocks, for a variant that runs them.
        """
        config = text_backbone(model).config
        before = config._attn_implementation
        with ExitStack() as stack:
            config._attn_implementation = self.attention
            stack.callback(setattr, config, "_attn_implementation", before)
            if self.pinned is not None:
                stack.enter_context(sdpa_kernel(self.pinned))
            if self.compiled:
                stack.enter_context(CompiledBlocks(model) if compiled is None else compiled)
            yield


def default_backends(device_type: str) -> tuple[str, ...]:
    """What is compared when nothing is named."""
    return _ON_GPU if device_type == "cuda" else _ON_CPU


def prefill_variants(
    backends: Sequence[str],
    heads: Mapping[int, HeadSet],
    *,
    sink: WholeNumber = 64,
    window: WholeNumber = 1024,
    implementation: Implementation = "auto",
) -> list[Variant]:
    """The variants of a comparison.

    Args:
        backends: Names of `BACKENDS`; "hybrid" is one variant for each number of dense heads.
        heads: Number of dense heads -> which.
        sink: First keys that streaming heads see.
        window: Last keys that they see.
        implementation: Of `hybrid_attention`.

    Raises:
        InputError: for an unknown name, hybrid attention without numbers of dense heads, or a sink or window out of
            range.

    Examples:
        >>> from hooked_mllm import HeadSet
        >>> two = HeadSet(["L0H1", "L2H3"], n_layers=3, n_heads=4)
        >>> [v.title for v in prefill_variants(["sdpa", "hybrid"], {2: two})]
        ["SDPA, torch's choice", 'hybrid, 2 dense']
    """
    sink, window = check_sink_and_window(sink, window)
    found: list[Variant] = []
    for name in dict.fromkeys(backends):
        if name not in BACKENDS:
            hint = nearest(name, BACKENDS)
            raise InputError(f"No backend {name!r}; expected some of {', '.join(BACKENDS)}. {hint}".rstrip())
        base, compiled, title = name.removesuffix("-compiled"), name.endswith("-compiled"), BACKENDS[name]
        if base == "hybrid":
            if not heads:
                raise InputError(f"The backend {name!r} needs numbers of dense heads (--dense).")
            for number, chosen in heads.items():
                key = name.replace("hybrid", f"hybrid-{number}")
                attention = f"hooked_bench_hybrid_{number}"
                register_hybrid_attention(attention, chosen, sink=sink, window=window, implementation=implementation)
                where = {"dense": chosen, "sink": sink, "window": window}
                found.append(Variant(key, title.format(number), attention, None, compiled, **where))
        elif base == "removed":
            found.append(Variant(name, title, REMOVED, None, compiled, exact=False))
        else:
            attention = "eager" if base == "eager" else "sdpa"
            found.append(Variant(name, title, attention, _PINNED.get(base), compiled))
    return found


def _removed(module: nn.Module, q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Queries as they came, laid out as attention's output: what is left is the model without attention."""
    return q.transpose(1, 2), None


def _no_mask(**arguments: Any) -> None:
    return None


AttentionInterface.register(REMOVED, _removed)
AttentionMaskInterface.register(REMOVED, _no_mask)
