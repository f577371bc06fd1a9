"""Hook points: named places on the data path, and how they are joined to the modules of a transformers model."""

from hooked_mllm.hooks.junction import Call as Call
from hooked_mllm.hooks.junction import Junction as Junction
from hooked_mllm.hooks.point import Handle as Handle
from hooked_mllm.hooks.point import HookFunction as HookFunction
from hooked_mllm.hooks.point import HookPoint as HookPoint
from hooked_mllm.hooks.registry import HookRegistry as HookRegistry
from hooked_mllm.hooks.registry import NameFilter as NameFilter
