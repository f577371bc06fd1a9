"""Pictures: maps of the heads, token values over the image, curves. Each call returns a `Figure` outside pyplot."""

from hooked_mllm.plots.ablation_curves import ablation_curves as ablation_curves
from hooked_mllm.plots.curves import coverage_curve as coverage_curve
from hooked_mllm.plots.group_bars import group_bars as group_bars
from hooked_mllm.plots.head_map import head_map as head_map
from hooked_mllm.plots.head_map import head_maps as head_maps
from hooked_mllm.plots.overlay import overlay as overlay
from hooked_mllm.plots.overlay import overlay_grid as overlay_grid
from hooked_mllm.plots.pair import pair as pair
from hooked_mllm.plots.prefill import prefill as prefill
from hooked_mllm.plots.scatter import scatter as scatter
from hooked_mllm.plots.stability_map import stability_map as stability_map
from hooked_mllm.plots.table_map import table_map as table_map
