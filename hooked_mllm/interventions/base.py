"""The base of interventions: edits at hook points, checked before they are registered, and a record of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model, Tower
from hooked_mllm.display.read_heads import whole_number
from hooked_mllm.errors import HeadError, HookNameError, HookValueError
from hooked_mllm.heads import HeadSet, HeadsLike, parse_heads
from hooked_mllm.heads.parsing import Pairs
from hooked_mllm.hooks import Handle, HookPoint
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.interventions.records import Record, Records

if TYPE_CHECKING:
    #: one layer or several, by number
    LayersLike = int | Iterable[int]
else:  # at run time anything, so that another value reaches the check whose error states what was expected
    LayersLike = Any
#: takes an activation and its hook point; None leaves the activation
Edit = Callable[[Tensor, HookPoint], Tensor | None]


@checked
class Intervention(ABC):
    """Edits of a model's activations while it runs; `model.intervene(...)` registers and removes them.

    A subclass defines its hook points and edits in `edits`, and its settings in `describe`. One object may be used many
    times, and on several models.

    Examples:
        >>> from hooked_mllm import HookedMLLM, Intervention, toys
        >>> class Negate(Intervention):
        ...     def edits(self, model):
        ...         yield "hook_embed", lambda x, hook: -x
        ...     def describe(self):
        ...         return {"intervention": "Negate"}
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> with model.intervene(Negate()) as records:
        ...     logits = model(sample)
        >>> records[0]
        {'intervention': 'Negate', 'applied': {'prefill': 1, 'decode': 0}}
    """

    @abstractmethod
    def edits(self, model: Model) -> Iterable[tuple[str, Edit]]:
        """Names of hook points, each with its edit; raises for settings that do not fit `model`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""

    def first_position(self, model: Model, inputs: ResolvedInput) -> int:
        """The first prompt position that it may change in any sample; a subclass without an own method has 0."""
        return 0

    def validate(self, model: Model) -> None:
        """Raise for settings that do not fit `model`, before anything is registered."""
        for name, _ in self.edits(model):
            model.registry[name]

    def attach(self, model: Model, record: dict[str, Any] | None = None) -> list[tuple[HookPoint, Handle]]:
        """Register the edits on a model; all of them or, on an error, none.

        Args:
            model: A `HookedMLLM`.
            record: Gets under "applied" the number of edited hook-point calls of each phase.

        Returns:
            The registered hooks, for `model.registry.detach`.
        """
        record = {} if record is None else record
        applied = record["applied"] = {"prefill": 0, "decode": 0}
        added: list[tuple[HookPoint, Handle]] = []
        try:
            for name, edit in self.edits(model):
                point = model.registry[name]
                added.append((point, point.add_hook(_counted(edit, applied))))
                added[-1][1].owner = self
        except BaseException:
            model.registry.detach(added)
            raise
        return added

    def __repr__(self) -> str:
        settings = {k: v for k, v in self.describe().items() if k != "intervention" and v is not None}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def _counted(edit: Edit, applied: dict[str, int]) -> Callable[..., Tensor | None]:
    def fn(activation: Tensor, hook: HookPoint) -> Tensor | None:
        result = edit(activation, hook)
        if result is not None and hook.context.recorded is None:  # not counted again where a block is recomputed
            applied["decode" if hook.step else "prefill"] += 1
        return result

    return fn


@contextmanager
def intervening(model: Model, interventions: Iterable[Any]) -> Iterator[Records]:
    """The body of `HookedMLLM.intervene`."""
    interventions = list(interventions)
    for each in interventions:
        if not all(callable(getattr(each, name, None)) for name in ("validate", "attach", "describe")):
            raise HookValueError(
                f"Expected interventions such as HeadAblation or Steer; got {type(each).__name__}. Plain hook "
                "functions go to `model.hooks`."
            )
        each.validate(model)
    records = Records(Record(each.describe()) for each in interventions)
    added: list[tuple[HookPoint, Handle]] = []
    context = model.registry.context
    with context.scope() as scope:
        try:
            with context.registers_in(scope):
                for each, record in zip(interventions, records, strict=True):
                    added += each.attach(model, record)
            yield records
        finally:
            model.registry.detach(added)


# -- checks that interventions share -------------------------------------------------------------------------------


def check_choice(what: str, value: object, choices: Collection[str]) -> None:
    """Raise for a value that is not among the choices."""
    if value not in choices:
        raise HookValueError(f"{what} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def tower_shape(model: Model, tower: Tower) -> tuple[int, int]:
    """(layers, heads per layer) of a tower."""
    cfg = model.cfg
    return (cfg.n_layers, cfg.n_heads) if tower == "text" else (cfg.vision_n_layers, cfg.vision_n_heads)


def keep_heads(heads: HeadsLike) -> HeadSet | Pairs:
    """The heads of an intervention, before its model is known."""
    return parse_heads(heads, allow_empty=False)


def heads_of(heads: HeadsLike, model: Model, tower: Tower) -> HeadSet:
    """Heads as a set that fits a tower of the model."""
    return parse_heads(heads, tower_shape(model, tower), whose=f"the {tower} tower of this model")


def keep_head_numbers(heads: LayersLike | HeadsLike) -> tuple[int, ...] | None:
    """Heads by number, the same in every layer; None for heads that have a layer."""
    numbers = None if isinstance(heads, Mapping) else _whole_numbers(heads)
    if numbers is not None and not numbers:
        raise HeadError("The set of heads is empty: leave heads out for all of them.")
    return numbers


def keep_layers(layers: LayersLike) -> int | tuple[int, ...]:
    """Layers as they were specified, safe to read more than once."""
    numbers = _whole_numbers(layers)
    if numbers is None:
        raise HookValueError(f"Expected layers by number, such as 3 or [3, 4]; got {layers!r}.")
    return numbers[0] if whole_number(layers) is not None else numbers


def layer_list(layers: int | tuple[int, ...] | None) -> list[int] | None:
    """Layers that `keep_layers` returned, as a record keeps them."""
    return [layers] if isinstance(layers, int) else None if layers is None else list(layers)


def layers_of(layers: LayersLike, count: int, tower: Tower) -> list[int]:
    """Layers by number, negative ones counted from the end."""
    kept = keep_layers(layers)
    numbers = (kept,) if isinstance(kept, int) else kept
    if not numbers:
        raise HookNameError("The set of layers is empty: an intervention needs at least one.")
    for layer in numbers:
        if not -count <= layer < count:
            raise HookNameError(f"Layer {layer} is out of range: the {tower} tower has {count} blocks.")
    return sorted({layer % count for layer in numbers})


def _whole_numbers(values: object) -> tuple[int, ...] | None:
    """One integer or several, as ints; None for anything else."""
    items = values if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    numbers = [whole_number(item) for item in items] if getattr(items, "ndim", 1) else [whole_number(values)]
    return None if None in numbers else tuple(number for number in numbers if number is not None)
