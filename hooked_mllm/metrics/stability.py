"""Stability: whether scores of different tasks rank the same heads highest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.display.blocks import html_block
from hooked_mllm.display.heat import html_heat
from hooked_mllm.errors import HeadError, InputError
from hooked_mllm.heads import HeadSet
from hooked_mllm.heads.head_scores import ScoresInput, check_scores
from hooked_mllm.storage import from_lists, read_json, restoring, to_lists, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # matplotlib is imported when something is drawn
    Figure = Any

KIND = "hooked_mllm.Stability"


@checked
@dataclass(frozen=True)
class Stability:
    """Similarity of the head scores of several tasks; `stability` computes it.

    Args:
        tasks: Names of the tasks.
        spearman: Rank correlation of all heads' scores between tasks, [task task].
        counts: Number of tasks in which a head reaches the threshold, [layer head]; 0 in layers not measured.
        thresholds: The score at the percentile, one per task.
        percentile: 0 to 100.
        provenance: Name and provenance of the scores, by task.
    """

    tasks: tuple[str, ...]
    spearman: Float[np.ndarray, "task task"]
    counts: Int[Tensor, "layer head"]
    thresholds: tuple[float, ...]
    percentile: float
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def universal(self) -> HeadSet:
        """The heads that reach the threshold in every task, in order of layer and head."""
        return self.heads(len(self.tasks))

    def heads(self, n_tasks: int) -> HeadSet:
        """The heads that reach the threshold in at least `n_tasks` tasks, from 1 to their number."""
        if not 1 <= n_tasks <= len(self.tasks):
            raise InputError(f"Expected a number of tasks from 1 to {len(self.tasks)}; got {n_tasks}.")
        return HeadSet.from_mask(self.counts >= n_tasks)

    @property
    def mean_spearman(self) -> float:
        """The mean correlation over all pairs of different tasks."""
        return float(np.mean([self.spearman[i, j] for i, j in combinations(range(len(self.tasks)), 2)]))

    def plot(self, *, title: str | None = None) -> Figure:
        """Draw both parts of figure 5 with `hooked_mllm.plots.stability_map`."""
        from hooked_mllm.plots import stability_map

        return stability_map(self, title=title)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON; raises a CacheFileError if that is not possible."""
        arrays = {"spearman": to_lists(self.spearman), "counts": to_lists(self.counts)}
        write_json(Path(path), KIND, vars(self) | arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Stability":
        """Read a file of `save`; raises a CacheFileError if it is missing, damaged, a pickle, or of another kind."""
        content = read_json(Path(path), KIND)
        with restoring(path):
            n = len(content["tasks"])
            result = cls(
                tuple(content["tasks"]),
                from_lists(content["spearman"]),
                torch.tensor(content["counts"], dtype=torch.int64),
                tuple(map(float, content["thresholds"])),
                float(content["percentile"]),
                dict(content["provenance"]),
            )
            if result.spearman.shape != (n, n) or len(result.thresholds) != n or result.counts.dim() != 2:
                raise ValueError(f"its parts do not fit its {n} tasks")
            return result

    def __repr__(self) -> str:
        return (
            f"Stability({', '.join(self.tasks)}: mean Spearman {self.mean_spearman:.3f}, {len(self.universal)} heads "
            f"in the top of all {len(self.tasks)} at percentile {self.percentile:g})"
        )

    def _repr_html_(self) -> str:
        title = f"Stability: rank correlations of head scores, {len(self.tasks)} tasks"
        note = f"{len(self.universal)} heads reach percentile {self.percentile:g} in every task"
        return html_block(title, html_heat(self.spearman, self.tasks, self.tasks), note=note)


@checked
def stability(scores_by_task: Mapping[str, ScoresInput], percentile: float | int = 95.0) -> Stability:
    r"""Compare the head scores of several tasks: rank correlations, and the heads that all of them find.

    $$M_t[l,h] = \big[s_t[l,h] \ge P_{95}(s_t)\big],\qquad \mathrm{Count}[l,h] = \sum_t M_t[l,h]$$

    - $s_t$: the scores of task t; $P_{95}$: their 95th percentile over all measured heads, by linear interpolation.
    - Universal heads: Count equals the number of tasks.
    - Spearman correlation between each pair of tasks, over all heads.

    Args:
        scores_by_task: Head scores of one model, of the same layers, by the name of the task; at least two.
        percentile: Threshold of each task, 0 to 100.

    Raises:
        NumericsError: If all the scores of a task are equal.

    Source: arXiv:2606.05843 eq. 20 and 21, figure 5.

    Examples:
        >>> from hooked_mllm import HeadScores
        >>> charts = HeadScores([[0.9, 0.1], [0.2, 0.3]])
        >>> result = stability({"charts": charts, "pages": charts * 2 + 1}, percentile=75)
        >>> result.universal, result.spearman[0, 1].item()
        (HeadSet(1 of 2 x 2: L0H0), 1.0)
    """
    if len(scores_by_task) < 2:
        raise InputError(f"Stability compares two tasks at least; got {list(scores_by_task) or 'none'}.")
    if not 0 <= percentile <= 100:
        raise InputError(f"percentile must be from 0 to 100; got {percentile!r}.")
    tasks = tuple(scores_by_task)
    scores = [check_scores(item, "A comparison of tasks") for item in scores_by_task.values()]
    for task, of_task in zip(tasks, scores, strict=True):
        if of_task.shape != scores[0].shape or of_task.missing != scores[0].missing:
            raise HeadError(
                f"The scores of {task!r} are {of_task.shape} (layers, heads) without layers {list(of_task.missing)}, "
                f"those of {tasks[0]!r} {scores[0].shape} without {list(scores[0].missing)}: compare one model's "
                "heads, all measured alike."
            )
    matrix = np.eye(len(tasks))
    for i, j in combinations(range(len(tasks)), 2):
        matrix[i, j] = matrix[j, i] = scores[i].spearman(scores[j])
    counts = torch.stack([s.percentile_mask(percentile) for s in scores]).sum(0)  # [task layer head] -> [layer head]
    thresholds = tuple(float(np.percentile(s.values[s.measured].numpy(), percentile)) for s in scores)
    provenance = {task: {"name": s.name, "provenance": s.provenance} for task, s in zip(tasks, scores, strict=True)}
    return Stability(tasks, matrix, counts, thresholds, float(percentile), provenance)
