"""The variants of one model's attention that a benchmark compares."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hooked_mllm.attention.registered import register_hybrid_attention
from hooked_mllm.bench.choices import BACKENDS
from hooked_mllm.bench.compiled import CompiledBlocks, text_backbone
from hooked_mllm.errors import InputError, nearest
from hooked_mllm.heads import HeadSet
from hooked_mllm.kernels.implementations import Implementation, Queries
from hooked_mllm.kernels.streaming_window import WholeNumber, check_sink_and_window

#: the attention implementation that computes no attention
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
        pinned: The only SDPA backend that may be used; None for torch's choice.
        compiled: Whether everything but attention is compiled.
        dense: The heads that see all keys; None if all heads do.
        exact: Whether it computes attention, so that its outputs are compared.
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
    def on(self, model: PreTrainedModel, compiled: CompiledBlocks | None = None) -> Iterator[None]:
        """Within it, the variant is active in a text decoder; `compiled`: the decoder's compiled blocks."""
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
    """The backends that are compared by default."""
    return _ON_GPU if device_type == "cuda" else _ON_CPU


def prefill_variants(
    backends: Sequence[str], heads: Mapping[int, HeadSet], *, sink: WholeNumber = 64, window: WholeNumber = 1024,
    implementation: Implementation = "auto",
) -> list[Variant]:  # fmt: skip
    """The variants of a comparison.

    Args:
        backends: Names of `BACKENDS`; "hybrid" is one variant for each number of dense heads.
        heads: The dense heads of each number.
        sink: First keys that streaming heads see.
        window: Last keys that they see.
        implementation: Implementation of `hybrid_attention`.

    Raises:
        InputError: For an unknown name, "hybrid" without dense heads, or a sink or window out of range.

    Examples:
        >>> from hooked_mllm import HeadSet
        >>> two = HeadSet(["L0H1", "L2H3"], n_layers=3, n_heads=4)
        >>> [v.title for v in prefill_variants(["sdpa", "hybrid"], {2: two})]
        ["SDPA, torch's choice", 'hybrid, 2 dense']
    """
    sink, window = check_sink_and_window(sink, window)
    variants: list[Variant] = []
    for name in dict.fromkeys(backends):
        if name not in BACKENDS:
            hint = nearest(name, BACKENDS)
            raise InputError(f"No backend {name!r}; expected some of {', '.join(BACKENDS)}. {hint}".rstrip())
        base, compiled, title = name.removesuffix("-compiled"), name.endswith("-compiled"), BACKENDS[name]
        if base == "hybrid":
            if not heads:
                raise InputError(f"The backend {name!r} needs numbers of dense heads (--dense).")
            for number, dense in heads.items():
                key = name.replace("hybrid", f"hybrid-{number}")
                attention = f"hooked_bench_hybrid_{number}"
                register_hybrid_attention(attention, dense, sink=sink, window=window, implementation=implementation)
                streaming = {"dense": dense, "sink": sink, "window": window}
                variants.append(Variant(key, title.format(number), attention, None, compiled, **streaming))
        elif base == "removed":
            variants.append(Variant(name, title, REMOVED, None, compiled, exact=False))
        else:
            attention = "eager" if base == "eager" else "sdpa"
            variants.append(Variant(name, title, attention, _PINNED.get(base), compiled))
    return variants


def _removed(module: nn.Module, q: Queries, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The queries in place of attention's output: what remains is the model without attention."""
    return rearrange(q, "batch head query d_head -> batch query head d_head"), None


AttentionInterface.register(REMOVED, _removed)
AttentionMaskInterface.register(REMOVED, lambda **arguments: None)
