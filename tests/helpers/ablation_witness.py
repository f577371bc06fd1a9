"""Ablations of some heads, made again by torch hooks on the unwrapped model."""

from hooked_mllm import HeadAblation

CHOSEN = [(0, 1), (2, 0), (2, 3)]


def by_hand(value):
    """`change` for `z_replaced`: the chosen heads take `value(z, layer, head)`."""

    def change(z, layer):
        out = z.clone()
        for l, h in CHOSEN:
            if l == layer:
                out[:, :, h] = value(z, l, h)
        return out

    return change


def ablate(heads=((0, 1),), mode="zero", phase="prefill", **more):
    return HeadAblation(heads, mode=mode, phase=phase, **more)
