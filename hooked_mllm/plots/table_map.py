"""Layer x place heat maps of causal effects."""

from typing import Any

import numpy as np
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from hooked_mllm.plots.figure import colour_scale, new_figure

#: places that get a tick of their own
MOST_TICKS = 24


def table_map(table: Any, *, title: str | None = None, cmap: str | Colormap | None = None) -> Figure:
    """Draw effects by layer and place: places across, layer 0 at the bottom.

    Args:
        table: A `CausalTable`.
        title: Above the map; the table's name by default.
        cmap: matplotlib colour map; one with white at zero where there are negative effects.

    Examples:
        >>> from hooked_mllm.metrics import CausalTable
        >>> figure = table_map(CausalTable([[0.1, -0.9]], places=["visual", "question"], name="patching"))
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['visual', 'question']
    """
    values = table.values.numpy()
    n_layers, n_places = values.shape
    figure = new_figure(
        float(np.clip(0.3 * n_places + 2.0, 4.0, 12.0)), float(np.clip(0.22 * n_layers + 1.2, 2.6, 9.0))
    )
    axes = figure.add_subplot()
    colours, norm = colour_scale(values, None, None, cmap)
    image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="nearest", origin="lower")
    step = -(-n_places // MOST_TICKS)
    shown = range(0, n_places, step)
    words = any(isinstance(place, str) for place in table.places)
    axes.set_xticks(list(shown), [str(table.places[i]) for i in shown], rotation=30 if words else 0)
    every = -(-n_layers // 12)
    axes.set_yticks(range(0, n_layers, every), [str(layer) for layer in table.layers[::every]])
    axes.set(xlabel="tokens" if words else "position", ylabel="layer", title=table.name if title is None else title)
    figure.colorbar(image, ax=axes, label="effect")
    return figure
