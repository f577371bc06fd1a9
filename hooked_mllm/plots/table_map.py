"""Heat maps of causal effects: layers up, positions or kinds of token across."""

import numpy as np
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError
from hooked_mllm.plots.figure import colour_scale, new_figure
from hooked_mllm.plots.protocols import Table, TableLike

#: columns with a tick of their own
MOST_TICKS = 24


@checked
def table_map(table: TableLike, *, title: str | None = None, cmap: str | Colormap | None = None) -> Figure:
    """Draw effects by layer and column (a position or a kind of token): columns across, layer 0 at the bottom.

    Args:
        table: A `CausalTable`.
        title: Above the map; the table's name by default.
        cmap: Colour map of matplotlib; one with white at zero where there are negative effects.

    Raises:
        InputError: For anything else.

    Examples:
        >>> from hooked_mllm.metrics import CausalTable
        >>> figure = table_map(CausalTable([[0.1, -0.9]], places=["visual", "question"], name="patching"))
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['visual', 'question']
    """
    if not isinstance(table, Table):
        raise InputError(f"expected a CausalTable, got {type(table).__name__}")
    values = table.values.numpy()
    n_layers, n_columns = values.shape
    width, height = np.clip(0.3 * n_columns + 2.0, 4.0, 12.0), np.clip(0.22 * n_layers + 1.2, 2.6, 9.0)
    figure = new_figure(float(width), float(height))
    axes = figure.add_subplot()
    colours, norm = colour_scale(values, cmap=cmap)
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest", origin="lower")
    step = -(-n_columns // MOST_TICKS)
    shown = range(0, n_columns, step)
    words = any(isinstance(place, str) for place in table.places)
    axes.set_xticks(list(shown), [str(table.places[i]) for i in shown], rotation=30 if words else 0)
    every = -(-n_layers // 12)
    axes.set_yticks(range(0, n_layers, every), [str(layer) for layer in table.layers[::every]])
    axes.set(xlabel="tokens" if words else "position", ylabel="layer", title=table.name if title is None else title)
    figure.colorbar(image, ax=axes, label="effect")
    return figure
