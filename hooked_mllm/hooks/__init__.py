"""Hook points: their table, the points themselves, and the torch hooks that serve them."""

from hooked_mllm.hooks.module_hook import Call as Call
from hooked_mllm.hooks.module_hook import ModuleHook as Junction  # noqa: F401  # its name in earlier versions
from hooked_mllm.hooks.module_hook import ModuleHook as ModuleHook
from hooked_mllm.hooks.point import Handle as Handle
from hooked_mllm.hooks.point import HookFunction as HookFunction
from hooked_mllm.hooks.point import HookPoint as HookPoint
from hooked_mllm.hooks.registry import HookRegistry as HookRegistry
from hooked_mllm.hooks.registry import NameFilter as NameFilter
