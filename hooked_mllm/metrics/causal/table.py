"""CausalTable: effects by layer and position or kind of token, such as those of patching the residual stream."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.display.blocks import html_block
from hooked_mllm.display.heat import html_heat
from hooked_mllm.errors import HeadError, NumericsError
from hooked_mllm.heads.head_values import Numbers, as_float64
from hooked_mllm.storage import described, read_tensors, restoring, write_tensors

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
else:  # matplotlib is imported when something is drawn
    Colormap = Figure = Any

KIND = "hooked_mllm.CausalTable"


@checked
class CausalTable:
    """A number for each layer and position or kind of token, with its provenance.

    Args:
        values: `[layer place]`, finite; stored as float64 on the CPU.
        places: The position or kind of token of each column.
        layers: The layer of each row; 0, 1, ... by default.
        name: Name of the values.
        provenance: JSON-able facts, as in `HeadScores`.

    Examples:
        >>> table = CausalTable([[0.1, 0.9], [0.0, 0.2]], places=["visual", "question"], name="demo")
        >>> table[0, "question"]
        0.9
    """

    values: Tensor

    def __init__(
        self,
        values: Numbers,
        *,
        places: Sequence[str | int],
        layers: Sequence[int] | None = None,
        name: str = "effect",
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.values = as_float64(values, "values [layer place]")
        self.places = tuple(places)
        self.layers = tuple(range(len(self.values)) if layers is None else layers)
        if self.values.dim() != 2 or self.values.shape != (len(self.layers), len(self.places)) or not self.places:
            raise HeadError(
                f"Expected values [layer place] of {len(self.layers)} layers and {len(self.places)} places; got shape "
                f"{list(self.values.shape)}."
            )
        if not bool(torch.isfinite(self.values).all()):
            layer, place = (~torch.isfinite(self.values)).nonzero()[0].tolist()
            raise NumericsError(
                f"{name} is not finite in layer {self.layers[layer]} at {self.places[place]!r}: the run overflowed."
            )
        self.name = name
        self.provenance = dict(provenance or {})

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, places)."""
        return len(self.layers), len(self.places)

    def __getitem__(self, key: tuple[int, str | int]) -> float:
        layer, place = key
        if layer not in self.layers or place not in self.places:
            raise HeadError(f"No effect of layer {layer} at {place!r}: layers {self.layers}, places {self.places}.")
        return float(self.values[self.layers.index(layer), self.places.index(place)])

    def plot(self, *, title: str | None = None, cmap: str | Colormap | None = None) -> Figure:
        """Draw a heat map with `hooked_mllm.plots.table_map`."""
        from hooked_mllm.plots import table_map

        return table_map(self, title=title, cmap=cmap)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; raises a CacheFileError if that is not possible."""
        header = {"name": self.name, "places": self.places, "layers": self.layers, "provenance": self.provenance}
        write_tensors(Path(path), KIND, {"values": self.values}, header)

    @classmethod
    def load(cls, path: str | Path) -> "CausalTable":
        """Read a file of `save`; raises a CacheFileError if it is missing, damaged, a pickle, or of another kind."""
        tensors, header = read_tensors(Path(path), KIND)
        with restoring(path):
            return cls(tensors["values"], places=header["places"], layers=header["layers"], **described(header))

    def __repr__(self) -> str:
        return f"CausalTable({self.name}, {self.shape[0]} layers x {self.shape[1]} places)"

    def _repr_html_(self) -> str:
        title = f"CausalTable: {self.name}, {self.shape[0]} layers x {self.shape[1]} places"
        return html_block(title, html_heat(self.values.numpy(), [f"L{layer}" for layer in self.layers], self.places))
