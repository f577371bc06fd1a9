"""MaskRows against the definition of each mask, written out key by key."""

import pytest
import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from hooked_mllm.attention.backends import twin
from hooked_mllm.attention.masks import RECIPE, MaskRows
from hooked_mllm.errors import NumericsError

CPU = torch.device("cpu")
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


def by_definition(q_length, kv_length, *, batch=2, offset=None, causal=True, window=None, padding=None):
    """[batch query key]: query i stands at position i + offset, the last one at the last key unless told otherwise."""
    offset = kv_length - q_length if offset is None else offset
    out = torch.zeros(batch, q_length, kv_length, dtype=torch.bool)
    for b in range(batch):
        for i in range(q_length):
            for j in range(kv_length):
                place = i + offset
                seen = (not causal or j <= place) and (window is None or j > place - window)
                out[b, i, j] = seen and (padding is None or (j < padding.shape[1] and bool(padding[b, j])))
    return out


def of(mask, q_length=6, kv_length=6, causal=True, **more):
    return MaskRows.of(mask, batch=2, q_length=q_length, kv_length=kv_length, device=CPU, causal=causal, **more)


def additive(visible):
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[:, None]


KINDS = {
    "none, causal": (of(None), by_definition(6, 6)),
    "none, decoding": (of(None, q_length=1), by_definition(1, 6)),
    "none, chunk after a cache": (of(None, q_length=3), by_definition(3, 6)),
    "none, vision": (of(None, causal=False), by_definition(6, 6, causal=False)),
    "window": (of(None, window=2), by_definition(6, 6, window=2)),
    "padding": (of(LEFT), by_definition(6, 6, padding=LEFT)),
    "padding on the right": (of(RIGHT), by_definition(6, 6, padding=RIGHT)),
    "boolean": (of(by_definition(6, 6, padding=LEFT)[:, None]), by_definition(6, 6, padding=LEFT)),
    "boolean for all": (of(by_definition(6, 6)[:1, None]), by_definition(6, 6)),
    "additive": (of(additive(by_definition(6, 6, padding=RIGHT))), by_definition(6, 6, padding=RIGHT)),
    "packed images": (of(None, segments=(2, 1, 3)), None),
}
KINDS["packed images"] = (
    KINDS["packed images"][0],
    torch.block_diag(*(torch.ones(n, n) for n in (2, 1, 3))).bool().expand(2, -1, -1),
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_of_every_kind(kind):
    rows, expected = KINDS[kind]
    assert torch.equal(rows.full(), expected)
    index = torch.tensor([[0, expected.shape[1] - 1], [expected.shape[1] - 1, 0]])
    assert torch.equal(rows.rows(index), torch.stack([expected[b, i] for b, i in enumerate(index)]))


@pytest.mark.parametrize("kind", KINDS)
def test_moving_compacting_and_picking_samples_keep_the_rows(kind):
    rows, expected = KINDS[kind]
    assert torch.equal(rows.to("cpu").full(), expected)
    assert torch.equal(rows.compact().full(), expected)
    assert torch.equal(rows.samples(torch.tensor([1])).full(), expected[1:])


def transformers_mask(base, window, padding, q_length, kv_length, offset):
    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    return ALL_MASK_ATTENTION_FUNCTIONS[twin(base)](
        batch_size=2,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=offset,
        kv_offset=0,
        mask_function=rule,
        attention_mask=None if padding is None else padding.bool(),
        allow_is_causal_skip=False,
        dtype=torch.float32,
        device=CPU,
    )


@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padding", [None, LEFT, RIGHT], ids=["none", "left", "right"])
@pytest.mark.parametrize(
    ("q_length", "kv_length", "offset"),
    [(6, 6, 0), (1, 6, 5), (1, 9, 5)],
    ids=["prefill", "decoding", "decoding into a static cache"],
)
def test_the_recipe_of_a_mask_that_transformers_made(base, window, padding, q_length, kv_length, offset):
    mask = transformers_mask(base, window, padding, q_length, kv_length, offset)
    expected = by_definition(q_length, kv_length, offset=offset, window=window, padding=padding)
    plain = mask if mask.dtype == torch.bool else mask == 0
    assert torch.equal(plain[:, 0].expand(2, -1, -1), expected)  # the witness agrees with transformers
    rows = of(mask, q_length, kv_length)
    assert rows.recipe is not None and rows.dense is None
    assert torch.equal(rows.full(), expected)
    assert torch.equal(rows.compact().full(), expected)
    assert torch.equal(rows.samples(torch.tensor([1, 0])).full(), expected.flip(0))


def test_the_recipe_gives_way_to_a_4d_mask_of_the_users():
    own = torch.rand(2, 1, 6, 6) > 0.5
    mask = own.clone()
    assert getattr(mask, RECIPE, None) is None
    assert torch.equal(of(mask).full(), own[:, 0])


def test_a_compact_causal_mask_holds_nothing_quadratic():
    rows = of(transformers_mask("sdpa", None, LEFT, 6, 6, 0)).compact()
    assert rows.dense is None and rows.recipe is None and rows.causal


def test_a_mask_that_adds_to_the_scores_is_refused():
    mask = torch.zeros(2, 1, 6, 6)
    mask[..., 3] = -1.5
    with pytest.raises(NumericsError, match="adds numbers to the scores.*load the model with attention='eager'"):
        of(mask)


def test_resizing_for_calls_put_side_by_side():
    rows = of(None, causal=False, segments=(6,)).resized(batch=1, length=9, segments=(6, 3))
    assert torch.equal(rows.full()[0], torch.block_diag(torch.ones(6, 6), torch.ones(3, 3)).bool())
