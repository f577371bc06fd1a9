"""Runs without compiled code, which keeps the hooks and the attention of the call in which it was compiled."""

import threading
from contextlib import ExitStack

import torch

from hooked_mllm.errors import HookValueError


class Uncompiled:
    """No compiled code in the body of a `with`; counted, as torch's stance is one for all threads and models."""

    def __init__(self) -> None:
        self.lock, self.count, self.stance = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.count == 0:
                try:
                    self.stance.enter_context(torch.compiler.set_stance("force_eager"))
                except RuntimeError as error:
                    raise HookValueError(
                        "Hooks cannot be active in a call that torch.compile compiles from outside: compile "
                        "`model.hf_model` or its blocks, whose compiled code is left out while hooks are active."
                    ) from error
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.count -= 1
            if self.count == 0:
                self.stance.close()


#: the only one of the process
UNCOMPILED = Uncompiled()
