"""Runs without compiled code, which keeps the hooks and the attention of the call in which it was compiled."""

import threading
from contextlib import ExitStack

import torch


class Uncompiled:
    """No compiled code in the body of a `with`; counted, as torch's stance is one for all threads and models."""

    def __init__(self) -> None:
        self.lock, self.count, self.stance = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if self.count == 0:
                self.stance.enter_context(torch.compiler.set_stance("force_eager"))
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.count -= 1
            if self.count == 0:
                self.stance.close()


#: the only one of the process
UNCOMPILED = Uncompiled()
