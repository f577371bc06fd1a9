"""What values on the command line mean."""

import argparse

#: the checkpoint of `hooked-mllm score` without arguments
TOY = "toy-qwen3-vl"
#: what `--metric` accepts, and the class of `hooked_mllm.metrics`
METRICS = {"ram": "RetrievalAttentionMass", "ktr": "KeyTokenRatio", "vision-mass": "VisionMass"}
#: what `--data` accepts
DATA_FORMS = "toy, refcocog:FOLDER, refcocog:FOLDER:SPLIT_BY or refcocog:FOLDER:SPLIT_BY:SPLIT"
#: what `--dtype` accepts
DTYPES = ("float32", "bfloat16", "float16")


def count(text: str, least: int = 1) -> int:
    """A whole number from `least` up."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} up, got {text!r}")
    return value


def tokens(text: str) -> int:
    """A number of tokens: "8192", or "8k" for 8 x 1024."""
    digits = text[:-1] if text[-1:] in ("k", "K") else text
    try:
        value = int(digits) * (1 if digits == text else 1024)
    except ValueError:
        value = 0
    if value < 2:
        raise argparse.ArgumentTypeError(f"expected a number of tokens such as 8192 or 8k, got {text!r}")
    return value


def torch_device(text: str) -> str:
    """A torch device of this machine."""
    import torch  # here and not above: `--help` and `--version` need none of it

    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a torch device, such as cpu or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} needs a CUDA device, and torch finds none")
    return text


def device_and_dtype(arguments: argparse.Namespace) -> tuple[str, str]:
    """`--device` and `--dtype`, or their defaults: cuda where there is a GPU, bfloat16 there, float32 on a CPU."""
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    default = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    return device, getattr(arguments, "dtype", None) or default
