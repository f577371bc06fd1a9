"""Everything but attention, compiled: what is left of prefill once attention is cheap.

Without attention's N x N, a decoder block at long context is matrix products, which run at the card's rate, and
elementwise steps (norms, rotary position encoding, the MLP's activation, residual sums), each of which reads and writes
whole activations. `torch.compile` joins the latter into few passes over memory.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hooked_mllm.attention.backends import implementation
from hooked_mllm.errors import InputError, UnsupportedModelError

#: the attention implementation of compiled blocks: the model's own, called between two compiled pieces
OUTSIDE = "outside_graph"
#: what that is, by the identity of the configuration
_BASES: dict[int, str] = {}
_MISSING: Any = object()


@torch.compiler.disable
def _outside(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    base = _BASES[id(module.config)]
    return implementation(module, base)(module, *args, **kwargs)


def _outside_mask(**arguments: Any) -> Any:
    base = _BASES[id(arguments["config"])]
    build: Any = ALL_MASK_ATTENTION_FUNCTIONS.get(base)
    return None if build is None else build(**arguments)


AttentionInterface.register(OUTSIDE, _outside)
AttentionMaskInterface.register(OUTSIDE, _outside_mask)


def text_backbone(model: Any) -> Any:
    """The text decoder of a transformers model or a HookedMLLM: it has `embed_tokens`, `layers` and `norm`.

    Raises:
        UnsupportedModelError: if there is none.
    """
    found: Any = getattr(model, "hf_model", model)
    if not hasattr(found, "layers") and hasattr(found, "get_decoder"):
        found = found.get_decoder()
    if not isinstance(getattr(found, "layers", None), nn.ModuleList) or not hasattr(found, "embed_tokens"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no text decoder with `embed_tokens` and `layers`; expected a transformers "
            "decoder such as Qwen3Model, a model that holds one, or a HookedMLLM."
        )
    return found


class CompiledBlocks:
    """The decoder blocks of one model, compiled while the context is entered; it may be entered again and again.

    Attributes:
        text: The text decoder.
    """

    def __init__(self, model: Any, *, backend: Any = "inductor", dynamic: bool | None = True) -> None:
        self.text = text_backbone(model)
        self._stack: ExitStack | None = None
        self._patches: list[tuple[nn.Module, str, Any]] = []
        for block in self.text.layers:
            if any(p.is_meta for p in block.parameters()):
                raise UnsupportedModelError(
                    "Blocks whose weights are offloaded cannot be compiled: give every layer a GPU in device_map."
                )
            # accelerate keeps a module's own forward there and moves inputs around it
            hooked = [m for m in block.modules() if hasattr(m, "_hf_hook")]
            forward = "_old_forward" if block in hooked else "forward"
            own = getattr(block, forward)
            self._patches.append((block, forward, torch.compile(own, backend=backend, dynamic=dynamic)))
            # inside a block, nothing moves any more
            self._patches += [(m, "forward", m._old_forward) for m in hooked if m is not block]

    def __enter__(self) -> "CompiledBlocks":
        config = self.text.config
        if config._attn_implementation == OUTSIDE:
            raise InputError("The blocks of this model run compiled already.")
        with ExitStack() as stack:
            # beyond the limit, torch would quietly run uncompiled
            limits = {"recompile_limit": 32, "fail_on_recompile_limit_hit": True}
            stack.enter_context(torch._dynamo.config.patch(limits))
            stack.enter_context(_outside_graph(config))
            for module, name, value in self._patches:
                stack.callback(_restore, module, name, module.__dict__.get(name, _MISSING))
                setattr(module, name, value)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        stack.close()


def compile_blocks(model: Any, *, backend: Any = "inductor", dynamic: bool | None = True) -> CompiledBlocks:
    """The decoder blocks of a model, to be run compiled: norms, projections, rotary encoding, MLP and residual sums.

    Attention stays outside of the compiled code: it runs as whatever implementation the model is set to, between two
    compiled pieces, so that any implementation works (SDPA pinned to a kernel, hybrid attention with other heads in
    every layer). All blocks share the code of one. Results differ from uncompiled ones by rounding: joined steps keep
    float32 where the model rounds in between.

    It is meant for plain forward passes: hooks on modules inside a block slow it down or are compiled in.

    Args:
        model: A transformers decoder (the text model of Qwen3-VL, Qwen3, Qwen2 and others built alike), a model that
            holds one, or a HookedMLLM.
        backend: Of `torch.compile`.
        dynamic: Of `torch.compile`; True compiles once for all lengths, None once for the first and once for others.

    Returns:
        A context manager; within it the blocks run compiled. It may be entered again, and then compiles nothing anew.

    Raises:
        UnsupportedModelError: for a model without a text decoder, or with offloaded weights.

    Examples:
        >>> import torch
        >>> from transformers import Qwen3Config, Qwen3Model
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
        >>> model = Qwen3Model(Qwen3Config(vocab_size=50, num_hidden_layers=2, **sizes)).eval()
        >>> tokens = torch.arange(12)[None]
        >>> with torch.no_grad(), compile_blocks(model, backend="eager"):
        ...     model(tokens, use_cache=False).last_hidden_state.shape
        torch.Size([1, 12, 16])
    """
    return CompiledBlocks(model, backend=backend, dynamic=dynamic)


@contextmanager
def _outside_graph(config: Any) -> Iterator[None]:
    base = config._attn_implementation or "eager"
    _BASES[id(config)] = base
    config._attn_implementation = OUTSIDE
    try:
        yield
    finally:
        config._attn_implementation = base
        del _BASES[id(config)]


def _restore(module: nn.Module, name: str, value: Any) -> None:
    if value is _MISSING:
        delattr(module, name)
    else:
        setattr(module, name, value)
