"""Steer: add a direction to the residual stream."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model, Phase, Tower
from hooked_mllm.errors import HookValueError
from hooked_mllm.hooks import HookPoint
from hooked_mllm.hooks.table import STREAM_SITES
from hooked_mllm.inputs.positions import Positions, describe_positions
from hooked_mllm.interventions.base import Edit, check_choice, layer_list, layers_of, tower_shape
from hooked_mllm.interventions.edited_positions import EditedPositions, PositionIntervention, check_edited_positions

if TYPE_CHECKING:
    StreamSite = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
else:  # at run time wider, so that another value reaches the check whose error lists the choices
    StreamSite = str


@checked
class Steer(PositionIntervention):
    r"""Add a direction to the residual stream: $x \leftarrow x + \alpha d$.

    Args:
        direction: d, of the tower's width; not normalised.
        layer: The layer or layers, negative ones counted from the end.
        positions: Positions of the prompt to steer; None for all.
        coefficient: α.
        phase: "prefill", "decode" (generated tokens), or "both".
        site: Where in the block: "resid_pre", "resid_mid", "resid_post", "attn_out" or "mlp_out".
        tower: "text" or "vision".

    Raises:
        HookValueError: For a direction that is not finite or not a vector of the tower's width, or an unknown site.
        HookNameError: For a layer that the model lacks.

    Examples:
        >>> import torch
        >>> from hooked_mllm import HookedMLLM, Steer, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> direction = torch.ones(model.cfg.d_model)
        >>> with model.intervene(Steer(direction, layer=1, positions="visual", coefficient=0.5)):
        ...     logits = model(sample)
    """

    def __init__(
        self,
        direction: Tensor,
        layer: int | Iterable[int],
        positions: Positions | None = None,
        coefficient: float | int = 1.0,
        *,
        phase: Phase = "both",
        site: StreamSite = "resid_post",
        tower: Tower = "text",
    ) -> None:
        check_choice("site", site, STREAM_SITES)
        if tower == "vision" and phase == "both":
            phase = "prefill"  # images are encoded there alone
        check_edited_positions(positions, phase, tower)
        if direction.dim() != 1:
            raise HookValueError(f"A direction is a vector [d_model]; got shape {tuple(direction.shape)}.")
        if not bool(torch.isfinite(direction).all()) or not bool(torch.isfinite(torch.tensor(float(coefficient)))):
            raise HookValueError("The direction or the coefficient is not finite.")
        self.direction, self.coefficient = direction, float(coefficient)
        self.layer = layer if isinstance(layer, int) else tuple(layer)
        self.positions, self.phase, self.site = positions, phase, site
        self.tower: Tower = tower

    def describe(self) -> dict[str, Any]:
        """Its settings, as values that JSON can hold."""
        return {
            "intervention": "Steer",
            "layers": layer_list(self.layer),
            "site": self.site,
            "coefficient": self.coefficient,
            "norm": float(self.direction.detach().float().norm()),
            "phase": self.phase,
            "positions": describe_positions(self.positions),
            "tower": self.tower,
        }

    def edits(self, model: Model) -> Iterator[tuple[str, Edit]]:
        """One edit in each layer."""
        width = model.cfg.d_model if self.tower == "text" else model.cfg.vision_d_model
        if len(self.direction) != width:
            raise HookValueError(
                f"The direction has {len(self.direction)} numbers; the {self.tower} tower is {width} wide."
            )
        edited = EditedPositions(model, self.positions, self.phase, self.tower)
        count, _ = tower_shape(model, self.tower)
        prefix = "" if self.tower == "text" else f"{self.tower}."

        def edit(x: Tensor, hook: HookPoint) -> Tensor | None:
            mask = edited.mask(x.shape[0], x.shape[1], hook, x.device)
            if mask is None:
                return None
            return torch.where(mask[..., None], x + self.coefficient * self.direction.to(x), x)

        for layer in layers_of(self.layer, count, self.tower):
            yield f"{prefix}blocks.{layer}.hook_{self.site}", edit
