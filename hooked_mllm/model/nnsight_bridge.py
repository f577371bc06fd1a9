"""`model.nnsight`: the model as an nnsight object, with the names of hook points inside a trace.

nnsight serves inputs and outputs of modules (see `wiring.module_sides`). Activations of the attention function and
those computed outside of modules come from their hook points, in traces that name them.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from greenlet import getcurrent
from nnsight import NNsight
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from hooked_mllm.contracts import Model
from hooked_mllm.errors import HookNameError, HookValueError, nearest
from hooked_mllm.hooks.module_hook import Call
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.registry import NameFilter
from hooked_mllm.inputs.resolve import ModelInput, ResolvedInput
from hooked_mllm.wiring.module_sides import ModuleSide, module_side


class NNsightModel(NNsight):
    """A model as an nnsight object, which `model.nnsight` returns. No weight is copied.

    Inside a trace `model.nnsight[name]` is the activation of that hook point, in the same shape. It may be edited in
    place, and `model.nnsight[name] = value` replaces it. As in nnsight, read activations in the order in which the
    model computes them (InternVL's tower computes v before q and k). Modules, `.save()`, `tracer.stop()`, `edit` and
    `session` are nnsight's own.

    Where both act on one module, hooks of this package see its input before nnsight does, and its output after.

    Examples:
        >>> from hooked_mllm import HookedMLLM, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> with model.nnsight.trace(sample):
        ...     z = model.nnsight["blocks.2.attn.hook_z"].save()
        ...     model.nnsight["blocks.3.attn.hook_z"][:, :, 4] = 0
        ...     logits = model.nnsight["hook_logits"].save()
        >>> z.shape == (1, len(sample), model.cfg.n_heads, model.cfg.d_head)
        True
    """

    def __init__(self, hooked: Model) -> None:
        self._hooked = hooked
        #: names that hook points serve in the active run
        self._served: frozenset[str] = frozenset()
        #: by name, the nnsight property and the envoy of which it is read
        self._values: dict[str, tuple[eproperty, Any]] = {}
        super().__init__(hooked.hf_model)

    def trace(self, inputs: ModelInput | None = None, *, fn: Any = None, hooks: NameFilter = (), **forward: Any) -> Any:
        """Open a trace of one forward pass, for use in a `with` statement.

        Args:
            inputs: A sample, a batch, or a mapping of model inputs; None to pass these as keyword arguments.
            fn: Run this function instead, as nnsight does, without this package's checks.
            hooks: Names that hook points serve: those that no module takes or returns, such as
                "blocks.*.attn.hook_pattern". A layer whose pattern is named computes explicit attention.
            **forward: As for `model(...)`, whose return value is the tracer's `result`.
        """
        if fn is not None:
            return self._alone(super().trace(*(() if inputs is None else (inputs,)), fn=fn, **forward))
        if inputs is None:
            inputs, forward = forward, {}
        run = Run(self._hooked, "run", self._hooked.registry.select(hooks))
        return self._alone(super().trace(self._hooked.resolve(inputs), fn=run, **forward))

    def generate(self, inputs: ModelInput, *, hooks: NameFilter = (), **options: Any) -> Any:
        """Open a trace of a generation, for use in a `with` statement; `tracer.iter[...]` iterates over its steps.

        Args:
            inputs: A sample, a batch padded on the left, or a mapping of model inputs.
            hooks: As for `trace`.
            **options: As for `model.generate`, whose token ids are the tracer's `result`.
        """
        run = Run(self._hooked, "run_generate", self._hooked.registry.select(hooks))
        return self._alone(super().trace(self._hooked.resolve(inputs), fn=run, **options))

    def _alone(self, tracer: Any) -> Any:
        """Let a trace run while no other thread runs the model: what modules compute reaches the trace that is open."""
        backend = tracer.backend

        def run(of: Any) -> Any:
            with self._hooked.registry.context.lock:
                return backend(of)

        tracer.backend = run
        return tracer

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a trace, as nnsight calls it, while the hook points that the trace names serve their activations."""
        points = fn.points if isinstance(fn, Run) else []
        before, self._served = self._served, frozenset(p.name for p in points)
        try:
            with self._hooked.hooks([(p.name, self._serve) for p in points]):
                return super().interleave(fn, *args, **kwargs)
        finally:
            self._served = before

    def _serve(self, value: Tensor, hook: HookPoint) -> Tensor:
        # a new tensor object, from which the model continues: gradients reach the one in the trace
        shown = value.view_as(value) if value.requires_grad else value
        return self.interleaver.handle(f"{HOOK_POINTS_ENVOY.path}.{hook.name}", shown)

    # -- names ---------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names that need no `hooks=`, in the order of `model.hook_dict`."""
        return [name for name in self._hooked.hook_dict if self._module_side(name) is not None]

    def __getitem__(self, key: Any) -> Any:
        if not (isinstance(key, str) and "hook_" in key):
            return super().__getitem__(key)
        activation, envoy = self._property(key)
        return activation.__get__(envoy)

    def __setitem__(self, key: str, value: Any) -> None:
        activation, envoy = self._property(key)
        activation.__set__(envoy, value)

    def _module_side(self, name: str) -> ModuleSide | None:
        return module_side(name, self._hooked.hf_model, self._hooked.family)

    def _property(self, name: str) -> tuple[eproperty, Any]:
        """The nnsight property that serves an activation, and the envoy of which it is read."""
        self._hooked.registry[name]
        if getattr(getcurrent(), "mediator", None) is None:
            raise HookValueError(
                f"{name!r} has a value only while the model runs: read it inside `with model.nnsight.trace(inputs):`."
            )
        served = name in self._served
        key = f"{HOOK_POINTS_ENVOY.path}.{name}" if served else name
        if key not in self._values:
            self._values[key] = (_at_hook_point(name), HOOK_POINTS_ENVOY) if served else self._at_module(name)
        return self._values[key]

    def _at_module(self, name: str) -> tuple[eproperty, Any]:
        side = self._module_side(name)
        if side is None:
            other = " A pattern can also be read from a cache: cache.pattern(...)." if "pattern" in name else ""
            raise HookNameError(
                f"No module takes or returns {name!r}, so nnsight has no place for it. Name it where the trace is "
                f"opened, and its hook point serves it: model.nnsight.trace(inputs, hooks={name!r}).{other} "
                f"{nearest(name, self.names)} `model.nnsight.names` lists the names that need no `hooks=`."
            )
        module = self._module.get_submodule(side.path)

        def call_of(raw: Any) -> Call:
            return Call(module, *raw) if side.side == "input" else Call(module, (), {}, raw)

        def get(envoy: Any, raw: Any) -> Tensor:
            return side.get(call_of(raw))

        def put(envoy: Any, value: Tensor, raw: Any) -> Any:
            call = call_of(raw)
            side.put(call, value)
            return (call.args, call.kwargs) if side.side == "input" else call.output

        def replace(envoy: Any, value: Any) -> Any:
            raw = Mediator.value(f"{envoy.path}.{side.side}")
            _check(name, value, side.get(call_of(raw)))
            return put(envoy, value, raw)

        activation = eproperty(key=side.side)(get).postprocess(replace)
        if not side.in_place:
            activation.transform(put)  # the model continues from the tensor in the trace: gradients reach it
        return activation, self.interleaver.envoys[id(module)]


#: takes the part of an envoy for activations that hook points serve
HOOK_POINTS_ENVOY = SimpleNamespace(path="hooks")


def _at_hook_point(name: str) -> eproperty:
    def get(_: Any, value: Tensor) -> Tensor:
        return value

    def replace(_: Any, value: Any) -> Any:
        _check(name, value, Mediator.value(f"{HOOK_POINTS_ENVOY.path}.{name}"))
        return value

    return eproperty(key=name)(get).postprocess(replace)


@dataclass
class Run:
    """What a trace runs: a method of the wrapper, and the hook points that serve activations in it."""

    hooked: Model
    method: str
    points: list[HookPoint]

    def __call__(self, inputs: ResolvedInput, **kwargs: Any) -> Any:
        """Call the method."""
        return getattr(self.hooked, self.method)(inputs, **kwargs)


def _check(name: str, value: object, current: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise HookValueError(
            f"{name!r} was given {type(value).__name__}; expected a tensor of shape {tuple(current.shape)}."
        )
    actual, expected = (f"shape {tuple(x.shape)}, {x.dtype}, on {x.device}" for x in (value, current))
    if actual != expected:
        raise HookValueError(f"{name!r} was given {actual}; expected {expected}.")
