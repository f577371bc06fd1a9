"""Parts of `DuoGate`: attention mixed of a full and a streaming branch, last hidden states, the state on disk."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.contracts import Model
from hooked_mllm.errors import CacheFileError
from hooked_mllm.inputs.resolve import ResolvedInput
from hooked_mllm.storage import Checkpoint

KIND = "hooked_mllm.DuoGate"


class MixedAttention:
    """An attention backend: each key-value head's full (gate 1) and streaming (gate 0) attention, mixed by its gate."""

    def __init__(
        self, gates: Float[Tensor, "layer kv_head"], sink: int, recent: int, padding: Bool[Tensor, "batch pos"]
    ) -> None:
        self.gates, self.layers = gates, set[int]()
        rank = (~padding).cumsum(1)
        self.near = (rank[:, :, None] - rank[:, None, :] < recent) | (rank <= sink)[:, None, :]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskRows, scale: float, layer: int) -> Tensor:
        """The attention of a layer: q, k, v `[batch head pos d_head]` -> `[batch query head d_head]`."""
        self.layers.add(layer)
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        visible = mask.full()
        blind = ~visible.any(-1, keepdim=True)  # padding: the softmax over nothing is NaN, and so is its gradient
        visible = visible | (blind & torch.eye(visible.shape[-1], dtype=torch.bool, device=visible.device))

        def attend(seen: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale).float()

        gate = self.gates[layer].to(q.device).repeat_interleave(groups)[:, None, None]
        near = self.near.to(q.device) | blind
        return (gate * attend(visible) + (1 - gate) * attend(visible & near)).transpose(1, 2).to(q.dtype)


def last_hidden(model: Model, inputs: ResolvedInput, mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, "row d_model"]:
    """The states after the final norm at the positions of a mask; float32."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(output)

    handle = model.ln_final.register_forward_hook(keep)
    try:
        model.run_trunk(inputs)
    finally:
        handle.remove()
    return kept[0][mask.to(kept[0].device)].float()  # [batch pos d_model] -> [row d_model]


class GateState:
    """The gates and their optimiser, in memory and in a checkpoint with the same settings."""

    def __init__(self, path: str | Path | None, gates: Tensor, lr: float, settings: dict[str, Any]) -> None:
        self.gates = gates
        self.optimiser = torch.optim.Adam([gates], lr=lr)
        self.distances: list[float] = []
        self._file = Checkpoint(path, KIND, settings)
        self._kept: dict[str, Tensor] = {}

    def step(self, loss: Tensor, distance: float, lr: float) -> None:
        """A step of Adam, with the gates clamped to [0, 1]."""
        (self.gates.grad,) = torch.autograd.grad(loss, self.gates)
        self.optimiser.param_groups[0]["lr"] = lr
        self.optimiser.step()
        with torch.no_grad():
            self.gates.clamp_(0, 1)
        self.distances.append(distance)
        if self._file.path is not None:  # a copy: the next step may be interrupted halfway
            moments = self.optimiser.state[self.gates]
            self._kept = {name: moments[name].detach().clone() for name in ("exp_avg", "exp_avg_sq")}
            self._kept["gates"] = self.gates.detach().clone()
            self._kept["distances"] = torch.tensor(self.distances, dtype=torch.float64)

    def save(self) -> None:
        """Write the state after the last whole step."""
        if self._kept:
            self._file.write(self._kept)

    def load(self) -> None:
        """Continue from the checkpoint, if there is one."""
        checkpoint = self._file.read()
        if checkpoint is None:
            return
        kept, _ = checkpoint
        if set(kept) != {"exp_avg", "exp_avg_sq", "gates", "distances"} or kept["gates"].shape != self.gates.shape:
            raise CacheFileError(f"{self._file.path} is damaged, or of a model of another shape.")
        with torch.no_grad():
            self.gates.copy_(kept["gates"])
        moments = {name: kept[name].to(self.gates.device) for name in ("exp_avg", "exp_avg_sq")}
        moments["step"] = torch.tensor(float(len(kept["distances"])))
        self.optimiser.state[self.gates] = moments
        self.distances = kept["distances"].tolist()
        self._kept = kept
