"""`model.nnsight`: the same module object as an nnsight object, with this package's names inside a trace.

Most names are views of what a module takes or returns, which is what nnsight serves. What lies inside the attention
function, or is computed beside the modules, has no place there: its hook point serves it, in traces that name it.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from greenlet import getcurrent
from nnsight import NNsight
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator
from torch import Tensor

from hooked_mllm.errors import HookNameError, HookValueError, nearest
from hooked_mllm.hooks.module_hook import Call
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.registry import NameFilter
from hooked_mllm.inputs.resolve import ModelInput
from hooked_mllm.wiring.places import Place, place_of


class NNsightModel(NNsight):
    """A model as an nnsight object: what `model.nnsight` gives. No weight is copied.

    Inside a trace `model.nnsight[name]` is the activation of that name, in the shape of the list of hook points. It may
    be edited in place, and `model.nnsight[name] = value` replaces it. As in nnsight, ask in the order in which the
    model runs (InternVL's tower makes v before q and k). Modules, `.save()`, `tracer.stop()`, `edit` and `session` are
    nnsight's own.

    Where both act on one module, hooks of this package see what it takes before nnsight, and what it returns after.

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

    def __init__(self, hooked: Any) -> None:
        self._hooked = hooked
        #: names that hook points serve in the run that goes on
        self._served: frozenset[str] = frozenset()
        self._values: dict[str, tuple[eproperty, Any]] = {}
        super().__init__(hooked.hf_model)

    # -- running -------------------------------------------------------------------------------------------------------

    def trace(self, inputs: ModelInput | None = None, *, fn: Any = None, hooks: NameFilter = (), **forward: Any) -> Any:
        """Open a trace of one forward pass, for use with `with`.

        Args:
            inputs: A sample, a batch, or a mapping of model inputs; or none, with these as keywords.
            fn: Run this instead, as nnsight does, without this package's checks.
            hooks: Names for hook points to serve: those that nnsight has no place for, such as
                "blocks.*.attn.hook_pattern". A layer whose pattern is named goes through explicit attention.
            **forward: As for `model(...)`.

        Returns:
            nnsight's tracer; its `result` is what `model(...)` returns.

        Raises:
            InputError: for inputs that the model would get wrong.
            HookNameError: for a name in `hooks` that this model lacks.
        """
        if fn is not None:
            return super().trace(*(() if inputs is None else (inputs,)), fn=fn, **forward)
        if inputs is None:
            inputs, forward = forward, {}
        return super().trace(self._hooked.resolve(inputs), fn=self._run("run", hooks), **forward)

    def generate(self, inputs: ModelInput, *, hooks: NameFilter = (), **options: Any) -> Any:
        """Open a trace of a generation, for use with `with`; `tracer.iter[...]` goes through its steps.

        Args:
            inputs: A sample, a batch padded on the left, or a mapping of model inputs.
            hooks: As for `trace`.
            **options: As for `model.generate`.

        Returns:
            nnsight's tracer; its `result` is the token ids.

        Examples:
            >>> from hooked_mllm import HookedMLLM, toys
            >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
            >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
            >>> with model.nnsight.generate(sample, max_new_tokens=2, do_sample=False) as tracer:
            ...     lengths = [].save()
            ...     for step in tracer.iter[:2]:
            ...         lengths.append(model.nnsight["blocks.3.attn.hook_z"].shape[1])
            >>> lengths == [len(sample), 1]
            True
        """
        return super().trace(self._hooked.resolve(inputs), fn=self._run("run_generate", hooks), **options)

    def _run(self, method: str, hooks: NameFilter) -> "Run":
        return Run(self._hooked, method, self._hooked.registry.select(hooks))

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """What runs a trace, in nnsight's words; the hook points that it names serve meanwhile."""
        points = fn.points if isinstance(fn, Run) else []
        before, self._served = self._served, frozenset(p.name for p in points)
        try:
            with self._hooked.hooks([(p.name, self._serve) for p in points]):
                return super().interleave(fn, *args, **kwargs)
        finally:
            self._served = before

    def _serve(self, value: Tensor, hook: HookPoint) -> Tensor:
        # another object, so that the model goes on from what was shown: gradients reach it
        shown = value.view_as(value) if value.requires_grad else value
        return self.interleaver.handle(f"{AT_HOOK_POINTS.path}.{hook.name}", shown)

    # -- names ---------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """The names that need no `hooks=`, in the order of `model.hook_dict`."""
        return [name for name in self._hooked.hook_dict if self._place(name) is not None]

    def __getitem__(self, key: Any) -> Any:
        if not (isinstance(key, str) and "hook_" in key):
            return super().__getitem__(key)
        value, envoy = self._where(key)
        return value.__get__(envoy)

    def __setitem__(self, key: str, value: Any) -> None:
        where, envoy = self._where(key)
        where.__set__(envoy, value)

    def _place(self, name: str) -> Place | None:
        return place_of(name, self._module, self._hooked.family)

    def _where(self, name: str) -> tuple[eproperty, Any]:
        """A value as nnsight serves it, and the envoy at which it does."""
        self._hooked.registry[name]
        if getattr(getcurrent(), "mediator", None) is None:
            raise HookValueError(
                f"{name!r} has a value only while the model runs: ask inside `with model.nnsight.trace(inputs):`."
            )
        key = f"{AT_HOOK_POINTS.path}.{name}" if name in self._served else name
        if key not in self._values:
            at_point = name in self._served
            self._values[key] = (_at_hook_point(name), AT_HOOK_POINTS) if at_point else self._at_module(name)
        return self._values[key]

    def _at_module(self, name: str) -> tuple[eproperty, Any]:
        place = self._place(name)
        if place is None:
            other = " A pattern can also be read from a cache: cache.pattern(...)." if "pattern" in name else ""
            raise HookNameError(
                f"No module takes or returns {name!r}, so nnsight has no place for it. Name it where the trace is "
                f"opened, and its hook point serves it: model.nnsight.trace(inputs, hooks={name!r}).{other} "
                f"{nearest(name, self.names)} `model.nnsight.names` lists what needs no naming."
            )
        module = self._module.get_submodule(place.module)

        def call_of(raw: Any) -> Call:
            return Call(module, *raw) if place.side == "input" else Call(module, (), {}, raw)

        def get(envoy: Any, raw: Any) -> Tensor:
            return place.get(call_of(raw))

        def put(envoy: Any, value: Tensor, raw: Any) -> Any:
            call = call_of(raw)
            place.put(call, value)
            return (call.args, call.kwargs) if place.side == "input" else call.output

        def replace(envoy: Any, value: Any) -> Any:
            raw = Mediator.value(f"{envoy.path}.{place.side}")
            now = place.get(call_of(raw))
            _check(name, value, now)
            if not place.in_place:
                return put(envoy, value, raw)
            now.copy_(value)
            return raw

        where = eproperty(key=place.side)(get).postprocess(replace)
        if not place.in_place:
            where.transform(put)  # the model goes on from what was shown: gradients reach it
        return where, self.interleaver.envoys[id(module)]


#: stands for an envoy where hook points serve
AT_HOOK_POINTS = SimpleNamespace(path="hooks")


def _at_hook_point(name: str) -> eproperty:
    def get(_: Any, value: Tensor) -> Tensor:
        return value

    def replace(_: Any, value: Any) -> Any:
        _check(name, value, Mediator.value(f"{AT_HOOK_POINTS.path}.{name}"))
        return value

    return eproperty(key=name)(get).postprocess(replace)


@dataclass
class Run:
    """What a trace runs: a method of the wrapper, and the hook points that serve meanwhile."""

    hooked: Any
    method: str
    points: list[HookPoint]

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Run it."""
        return getattr(self.hooked, self.method)(inputs, **kwargs)


def _check(name: str, value: Any, now: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise HookValueError(f"{name!r} was given {type(value).__name__}; expected a tensor of {tuple(now.shape)}.")
    got, due = ((tuple(x.shape), x.dtype, x.device) for x in (value, now))
    if got != due:
        raise HookValueError(
            f"{name!r} was given shape {got[0]}, {got[1]}, on {got[2]}; expected shape {due[0]}, {due[1]}, on {due[2]}."
        )
