"""Calls of the transformers model itself while hooks are registered: each is a run, with positions and checks."""

import functools
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.inputs.positions import MappingMasks
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.model.running import running
from hooked_mllm.wiring.compiled import UNCOMPILED


class DirectCalls:
    """Replaces `forward` of a transformers model, and leaves compiled code out, while a hook is registered anywhere.

    Without it `hf_model(...)` and `hf_model.generate(...)` would run hooks without knowing what is prompt.
    """

    def __init__(self, model: Model) -> None:
        self.model, registry = weakref.ref(model), model.registry
        self.stack = ExitStack()
        weakref.finalize(model, self.stack.close)
        if registry.on_use is not None:  # of an earlier wrapper of the model
            registry.on_use(False)
        registry.on_use = self
        if registry.used:
            self(True)

    def __call__(self, used: bool) -> None:
        """Begin, or end, with the first and the last hook."""
        self.stack.close()
        model = self.model()
        if model is None or not used:
            return
        if "torch._dynamo" in sys.modules:
            self.stack.enter_context(UNCOMPILED)
        hf_model, before = model.hf_model, vars(model.hf_model).get("forward")
        forward = self._as_run(hf_model.forward)
        hf_model.forward = forward

        def restore() -> None:
            if vars(hf_model).get("forward") is not forward:  # another library has replaced it since
                return
            del hf_model.forward
            if before is not None:
                hf_model.forward = before

        self.stack.callback(restore)

    def _as_run(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            model, tokens = self.model(), args[0] if args else kwargs.get("input_ids")
            if model is None or model.registry.context.run is not None or not isinstance(tokens, Tensor):
                return original(*args, **kwargs)
            tensors = {**kwargs, "input_ids": tokens}
            masks = MappingMasks(tensors, model.family, model.hf_model.config)
            inputs = ResolvedInput(tensors, masks, (None,) * len(tokens), tensors)
            with running(model, inputs, tensors):
                return original(*args, **kwargs)

        return forward
