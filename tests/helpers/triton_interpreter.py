"""Where the cases of the Triton kernels run: on a GPU, or without one under Triton's interpreter."""

import torch
from triton.runtime import interpreter

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:  # Triton 3.6's interpreter calls int() on arrays of one number, which raises in NumPy 2.5
    _patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor, *rest):
        _patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_lang_tensor

#: Triton's interpreter multiplies the bits of bfloat16 matrices as if they were integers
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
