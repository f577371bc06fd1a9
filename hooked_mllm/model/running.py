"""One run of the model: its place in the sequence, the attention that is active, and whether every hook fired."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from hooked_mllm.contracts import Model
from hooked_mllm.display.read_heads import whole_number
from hooked_mllm.errors import HookValueError, InputError
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.run_context import Run
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.model.recomputing import hooks_when_recomputed


@contextmanager
def running(
    model: Model,
    inputs: ResolvedInput,
    arguments: Mapping[str, Any],
    stop: int | None = None,
    head: bool = True,
    prompt_length: int | None = None,
) -> Iterator[Run]:
    """Run the model in the body of a `with`; at its end, hooks that should have fired and did not raise.

    Args:
        model: A `HookedMLLM`.
        inputs: What it runs on.
        arguments: What it is called with.
        stop: The first block that is not run; None for the end.
        head: Whether logits are computed.
        prompt_length: Positions of the prompt, of which the inputs may be a part; None where they complete it.

    Raises:
        HookValueError: If an activation was computed without the hooks that are registered on it.
    """
    past = cache_length(arguments.get("past_key_values"))
    if prompt_length is not None and (whole_number(prompt_length) or 0) < 1:
        raise InputError(f"prompt_length is the number of positions of the whole prompt; got {prompt_length!r}.")
    with model.registry.running_on(inputs, first=past) as run, ExitStack() as stack:
        run.rows = inputs.length
        if prompt_length is None:  # one token behind a KV cache is a generated one
            prompt_length = past if past and inputs.length == 1 else past + inputs.length
        run.prompt_length, run.step = prompt_length, max(0, past + inputs.length - prompt_length)
        if run.parent is not None:  # the run outside continues with the state of its own prompt
            stack.callback(model.family.restore, model.hf_model, model.family.state(model.hf_model))
        if not past:
            model.family.reset(model.hf_model)
        stack.enter_context(hooks_when_recomputed(model))
        yield run
        check_fired(model, run, inputs, stop, head)


def cache_length(past: Any) -> int:
    """Positions in a KV cache; 0 without one."""
    if past is not None and not hasattr(past, "get_seq_length"):
        raise InputError(f"past_key_values is a KV cache such as DynamicCache; got {type(past).__name__}.")
    return 0 if past is None else int(past.get_seq_length())


@contextmanager
def following_steps(model: Model, run: Run, prompt_length: int) -> Iterator[None]:
    """Keep the position and the step of a generation up to date, by position and not by call, in a `with`."""
    run.prompt_length, calls, end = prompt_length, 0, 0

    def follow(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls, end
        if model.registry.context.run is not run:  # a hook runs the model inside of this run
            return
        past, tokens = kwargs.get("past_key_values"), args[0] if args else kwargs.get("input_ids")
        if past is None:
            run.first = 0
        else:
            length = past.get_seq_length()
            run.first = length if isinstance(length, int) else (end if calls else int(length))
        if run.first >= prompt_length or (past is None and calls):
            run.step += 1
        rows = kwargs["inputs_embeds"].shape[1] if tokens is None else tokens.shape[1]
        run.rows = rows
        end, calls = run.first + rows, calls + 1

    with model.hf_model.register_forward_pre_hook(follow, with_kwargs=True):
        yield


def check_fired(model: Model, run: Run, inputs: ResolvedInput, stop: int | None, head: bool) -> None:
    """Raise if a hook, tap or backend is active on an activation that the run reached, and it was not called.

    Raises:
        HookValueError: With the names of the points.
    """
    images = any(value is not None for name, value in inputs.tensors.items() if name.startswith("pixel_values"))

    def reached(point: HookPoint) -> bool:
        if point.tower != "text" or point.name.endswith("hook_deepstack"):
            return images and (point.block is None or stop is None or point.tower != "text" or point.block < stop)
        if point.block is not None:
            return stop is None or point.block < stop
        return point.name == "hook_embed" or (stop is None and (head or point.name != "hook_logits"))

    active = [p for p in model.registry.registered if p.name not in run.fired and p.active]
    lost = [point.name for point in active if reached(point)]
    for site in (*model.wiring.text, *model.wiring.vision):
        if site.name not in run.fired and (site.taps or site.backend is not None) and reached(site.points["z"]):
            lost.append(site.name)
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise HookValueError(
            f"This run did not call the hooks on {shown}, so what they edit or read was lost. The module was called in "
            "another way than by the model, its forward or its torch hooks were replaced, or the inputs skip it "
            "(inputs_embeds). Load the model again, without compiled or replaced modules."
        )
