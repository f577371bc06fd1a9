"""What values on the command line mean."""

import argparse

import torch


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
    """A number of tokens: "8192", or "8k" for 8 x 1024.

    Examples:
        >>> tokens("128k")
        131072
    """
    digits = text[:-1] if text[-1:] in ("k", "K") else text
    try:
        value = int(digits) * (1 if digits == text else 1024)
    except ValueError:
        value = 0
    if value < 2:
        raise argparse.ArgumentTypeError(f"expected a number of tokens such as 8192 or 8k, got {text!r}")
    return value


def torch_device(text: str) -> str:
    """A torch device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a torch device, such as cpu or cuda:0") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(f"{text!r} was asked for, but torch sees no CUDA device here")
    return text
