"""Checks of the arguments of public callables (`arguments`): their types, devices and numbers."""

from hooked_mllm.checks.arguments import as_device, checked, numbers

__all__ = ["as_device", "checked", "numbers"]
