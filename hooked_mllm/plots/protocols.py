"""What plots draw: anything with these values and names. The classes of other rooms satisfy them without an import."""

# ruff: noqa: D102 -- a comment at each member describes it

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hooked_mllm.display.read_heads import HeadsLike
from hooked_mllm.layout import Region, TokenLayout


@runtime_checkable
class Scores(Protocol):
    """Scores of attention heads, such as `HeadScores`."""

    values: Tensor  #: `[layer head]`; NaN in layers that were not measured
    name: str  #: what the numbers are

    def top(self, k: int | float) -> Iterable[tuple[int, int]]: ...  # the `k` highest heads, or that share of them


@runtime_checkable
class Curve(Protocol):
    """An objective against the number of heads ablated, such as `AblationCurveResult`."""

    @property
    def ks(self) -> Sequence[int]: ...  # numbers of heads, ascending
    @property
    def objective(self) -> str: ...  # name of the objective
    @property
    def rankings(self) -> Sequence[str]: ...  # the rankings measured: "top", "bottom", "random"
    @property
    def n_samples(self) -> int: ...  # number of samples
    @property
    def values(self) -> Mapping[str, Float[np.ndarray, "seed k"]]: ...  # the mean over samples, by ranking
    def mean(self, ranking: str) -> Float[np.ndarray, " k"]: ...  # the mean over samples and seeds
    def interval(
        self, ranking: str, level: float = ...
    ) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]: ...  # lower and upper ends for each k


@runtime_checkable
class Coverage(Protocol):
    """Coverage of the target against the number of heads, such as `CoverageCurve`."""

    ks: list[int]  #: numbers of heads
    coverage: list[float]  #: the share covered by each number of heads, 0 to 1


@runtime_checkable
class Table(Protocol):
    """Effects by layer and column, such as `CausalTable`."""

    values: Tensor  #: `[layer column]`
    layers: tuple[int, ...]  #: the layer of each row
    places: tuple[str | int, ...]  #: the position, or the kind of token, of each column
    name: str  #: what the numbers are


@runtime_checkable
class TaskAgreement(Protocol):
    """How alike the head scores of several tasks are, such as `Stability`."""

    @property
    def tasks(self) -> Sequence[str]: ...  # names of the tasks
    @property
    def spearman(self) -> np.ndarray: ...  # rank correlations `[task task]`
    @property
    def counts(self) -> Tensor: ...  # number of tasks in which each head is among the top, `[layer head]`
    @property
    def percentile(self) -> float: ...  # the percentile from which on a head is among the top


@runtime_checkable
class TimedVariants(Protocol):
    """What `bench_prefill` returns, as far as it is drawn: variants, their titles, and the one to compare with."""

    titles: dict[str, str]
    settings: dict[str, Any]

    @property
    def base(self) -> str: ...  # the variant that others are compared with
    def times(self, variant: str) -> Mapping[int, Sequence[float]]: ...  # milliseconds of a variant by context length


if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from PIL.Image import Image

    #: numbers as a tensor, an array or nested lists
    Numbers = Tensor | ArrayLike
    #: scores of heads, or plain numbers `[layer head]`
    ScoresLike = Scores | Numbers
    #: one ablation curve, or several by label
    CurvesLike = Curve | Mapping[str, Curve]
    #: one coverage curve, a measured one or shares `[k]`, or several by label
    CoverageLike = Coverage | Numbers
    #: a record of times, or label -> context length -> milliseconds
    TimesLike = TimedVariants | Mapping[str, Mapping[int, Numbers]]
    StabilityLike = TaskAgreement
    TableLike = Table
    #: how many of the top heads (int), which share of them (float), or which heads
    HeadChoice = int | float | HeadsLike

    class Clip(Protocol):
        """A video of a sample."""

        @property
        def frames(self) -> np.ndarray: ...  # RGB, `[frame height width channel]`
        @property
        def times_s(self) -> Sequence[float]: ...  # the time of each frame in seconds

    class Pictured(Protocol):
        """A prepared sample, such as `Sample`."""

        @property
        def layout(self) -> TokenLayout: ...  # what each position is, and which pixels it sees
        @property
        def question(self) -> str: ...  # the question about the pictures
        @property
        def images(self) -> Sequence[Image]: ...  # the images, in the order of the prompt
        @property
        def videos(self) -> Sequence[Clip]: ...  # the videos, in the order of the prompt
        @property
        def target(self) -> Region | Sequence[Region] | None: ...  # the region that the question is about
else:  # at run time anything, so that another value reaches the check whose error states what was expected
    Numbers = ScoresLike = CurvesLike = CoverageLike = TimesLike = Any
    StabilityLike = TableLike = HeadChoice = Clip = Pictured = Any
