"""Compiles everything but attention: `torch.compile` fuses norms, rotary encoding, activations and residual sums."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hooked_mllm.attention.backends import implementation
from hooked_mllm.contracts import Model
from hooked_mllm.errors import InputError, UnsupportedModelError

#: a backend of `torch.compile`: its name, or a function of a graph and its inputs
CompileBackend = str | Callable[..., Any]
#: the attention implementation of compiled blocks: it calls the model's own between two compiled pieces
OUTSIDE = "outside_graph"
#: the model's own attention implementation, by the identity of the configuration
_BASES: dict[int, str] = {}
_MISSING: Any = object()


@torch.compiler.disable
def _outside(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return implementation(module, _BASES[id(module.config)])(module, *args, **kwargs)


def _outside_mask(**arguments: Any) -> Any:
    build: Any = ALL_MASK_ATTENTION_FUNCTIONS.get(_BASES[id(arguments["config"])])
    return None if build is None else build(**arguments)


AttentionInterface.register(OUTSIDE, _outside)
AttentionMaskInterface.register(OUTSIDE, _outside_mask)


def text_backbone(model: nn.Module | Model) -> PreTrainedModel:
    """The text decoder of a transformers model or a HookedMLLM: it has `embed_tokens`, `layers` and `norm`."""
    decoder: Any = getattr(model, "hf_model", model)
    if not hasattr(decoder, "layers") and hasattr(decoder, "get_decoder"):
        decoder = decoder.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or not hasattr(decoder, "embed_tokens"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no text decoder with `embed_tokens` and `layers`; expected a transformers "
            "decoder such as Qwen3Model, a model that contains one, or a HookedMLLM."
        )
    return decoder


class CompiledBlocks:
    """A context manager that compiles the decoder blocks of one model; it may be entered repeatedly.

    The arguments are those of `compile_blocks`; `text` is the text decoder.
    """

    def __init__(
        self, model: nn.Module | Model, *, backend: CompileBackend = "inductor", dynamic: bool | None = True
    ) -> None:
        self.text = text_backbone(model)
        self._stack: ExitStack | None = None
        self._patches: list[tuple[nn.Module, str, object]] = []
        for block in cast(nn.ModuleList, self.text.layers):
            if any(p.is_meta for p in block.parameters()):
                raise UnsupportedModelError(
                    "Blocks whose weights are offloaded cannot be compiled: give every layer a GPU in device_map."
                )
            # accelerate moves inputs in a forward of its own and keeps the module's as `_old_forward`
            hooked = [module for module in block.modules() if hasattr(module, "_hf_hook")]
            name = "_old_forward" if block in hooked else "forward"
            self._patches.append((block, name, torch.compile(getattr(block, name), backend=backend, dynamic=dynamic)))
            # inputs are moved at the block, so modules inside it run their own forward
            self._patches += [(module, "forward", module._old_forward) for module in hooked if module is not block]

    def __enter__(self) -> "CompiledBlocks":
        config = self.text.config
        if config._attn_implementation == OUTSIDE:
            raise InputError("The blocks of this model are compiled already.")
        base = config._attn_implementation or "eager"
        with ExitStack() as stack:
            # at the limit, torch would otherwise run uncompiled without an error
            limits = {"recompile_limit": 32, "fail_on_recompile_limit_hit": True}
            stack.enter_context(torch._dynamo.config.patch(limits))
            _BASES[id(config)] = base
            stack.callback(_BASES.pop, id(config))
            config._attn_implementation = OUTSIDE
            stack.callback(setattr, config, "_attn_implementation", base)
            for module, name, value in self._patches:
                stack.callback(_restore, module, name, module.__dict__.get(name, _MISSING))
                setattr(module, name, value)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        stack.close()


def compile_blocks(
    model: nn.Module | Model, *, backend: CompileBackend = "inductor", dynamic: bool | None = True
) -> CompiledBlocks:
    """Compile the decoder blocks of a model: norms, projections, rotary encoding, MLP and residual sums.

    The model's attention implementation, whichever it is, runs between two compiled pieces. All blocks share one
    compiled code. Results differ from uncompiled ones by rounding: fused steps keep float32 where the model rounds in
    between. Hooks on modules inside a block slow it down or are compiled in.

    Args:
        model: A transformers decoder of the structure of Qwen3, a model that contains one, or a HookedMLLM.
        backend: Backend of `torch.compile`.
        dynamic: The argument of `torch.compile`: True compiles once for all lengths, None once for the first length and
            once for others.

    Returns:
        A context manager; within it the blocks run compiled. Entering it again compiles nothing.

    Raises:
        UnsupportedModelError: For a model without a text decoder, or with offloaded weights.

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


def _restore(module: nn.Module, name: str, value: object) -> None:
    if value is _MISSING:
        delattr(module, name)
    else:
        setattr(module, name, value)
