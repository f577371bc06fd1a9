"""MaskRows against the definition of each mask, written out key by key."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from hooked_mllm.attention.backends import hooked_name, slim_mask
from hooked_mllm.attention.masks import RECIPE, MaskRows
from hooked_mllm.attention.streaming import StreamingHeads
from hooked_mllm.errors import NumericsError, UnsupportedModelError

CPU = torch.device("cpu")
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


def by_definition(q_length, kv_length, *, batch=2, offset=None, causal=True, window=None, padding=None):
    """[batch query key]: query i is at position i + offset, the last one at the last key by default."""
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


def called(build, rule, padding, q_length, kv_length, offset, skip):
    """What a mask function of transformers makes of a call as its models make it."""
    return build(
        batch_size=2,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=offset,
        kv_offset=0,
        mask_function=rule,
        attention_mask=None if padding is None else padding.bool(),
        allow_is_causal_skip=skip,
        dtype=torch.float32,
        device=CPU,
    )


def transformers_mask(base, window, padding, q_length, kv_length, offset):
    rule = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    return called(ALL_MASK_ATTENTION_FUNCTIONS[hooked_name(base)], rule, padding, q_length, kv_length, offset, False)


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


def test_a_4d_mask_of_the_user_replaces_the_recipe():
    own = torch.rand(2, 1, 6, 6) > 0.5
    mask = own.clone()
    assert getattr(mask, RECIPE, None) is None
    assert torch.equal(of(mask).full(), own[:, 0])


def test_a_compact_causal_mask_holds_nothing_quadratic():
    rows = of(transformers_mask("sdpa", None, LEFT, 6, 6, 0)).compact()
    assert rows.dense is None and rows.recipe is None and rows.causal


def test_a_mask_that_adds_to_the_scores_is_rejected():
    mask = torch.zeros(2, 1, 6, 6)
    mask[..., 3] = -1.5
    with pytest.raises(NumericsError, match="adds numbers to the scores.*load the model with attention='eager'"):
        of(mask)


def test_a_mask_that_is_no_tensor_is_rejected():
    blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu")
    with pytest.raises(UnsupportedModelError, match="takes a BlockMask for its mask.*'sdpa' or 'eager'"):
        of(blocks)


def test_resizing_for_calls_put_side_by_side():
    rows = of(None, causal=False, segments=(6,)).resized(batch=1, length=9, segments=(6, 3))
    assert torch.equal(rows.full()[0], torch.block_diag(torch.ones(6, 6), torch.ones(3, 3)).bool())


# -- masks in numbers, and heads that stream ---------------------------------------------------------------------------


@st.composite
def calls(draw):
    """A call of attention, in each form in which its mask can come."""
    q_length = draw(st.integers(1, 7))
    before, room = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    seen, kv_length = before + q_length, before + q_length + room
    batch, n_heads = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    ends = [sorted((draw(st.integers(0, seen)), draw(st.integers(0, seen)))) for _ in range(batch)]
    if draw(st.booleans()):
        ends = [(0, seen)] * batch
    whole = all(end == (0, seen) for end in ends)
    forms = ["recipe", "slim", "boolean"]
    forms += ["2d"] if q_length > 1 else []
    forms += ["none"] if whole and not room and q_length > 1 else []
    forms += ["none, static"] if whole and not before and q_length > 1 else []
    if room:
        forms.remove("boolean")  # has no positions of queries
    dense = tuple(draw(st.sets(st.integers(0, n_heads - 1))))
    heads = (dense, n_heads, draw(st.integers(0, 5)), draw(st.integers(1, 6)))
    return draw(st.sampled_from(forms)), q_length, kv_length, before, ends, heads


def written_out(q_length, kv_length, before, ends, heads):
    """[whether heads stream, batch, head, query, key]"""
    dense, n_heads, sink, window = heads
    shown = np.zeros((2, len(ends), n_heads, q_length, kv_length), dtype=bool)
    for b, (start, end) in enumerate(ends):
        for h in range(n_heads):
            for i in range(q_length):
                for j in range(start, end):
                    place = i + before
                    shown[0, b, h, i, j] = j <= place
                    shown[1, b, h, i, j] = j <= place and (h in dense or j < start + sink or j > place - window)
    return shown


def rows_of(form, batch, q_length, kv_length, before, padding):
    recipe = {
        "batch_size": batch,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": before,
        "mask_function": causal_mask_function,
        "attention_mask": padding,
        "device": CPU,
    }
    if form == "recipe":
        mask = ALL_MASK_ATTENTION_FUNCTIONS[hooked_name("sdpa")](**recipe, allow_is_causal_skip=False)
    elif form == "slim":
        mask = slim_mask("sdpa")(**recipe, allow_is_causal_skip=False)
    elif form == "2d":
        mask = padding
    elif form == "boolean":
        causal = torch.arange(kv_length) <= torch.arange(q_length)[:, None] + before
        mask = (causal & padding[:, None])[:, None]
    else:
        mask = None
    common = {"batch": batch, "q_length": q_length, "kv_length": kv_length, "device": CPU}
    return MaskRows.of(mask, **common, causal=True, upper_left=form != "none")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(calls())
def test_bounds_and_streaming_rows_are_those_written_out(call):
    form, q_length, kv_length, before, ends, heads = call
    batch, streaming, shown = len(ends), StreamingHeads(*heads), written_out(*call[1:])
    padding = torch.tensor([[start <= j < end for j in range(before + q_length)] for start, end in ends])
    mask = rows_of(form, batch, q_length, kv_length, before, padding)
    index = torch.arange(q_length).expand(batch, -1)
    bounds = mask.bounds()
    assert bounds is not None and bounds.offset == before
    for b, (start, end) in enumerate(ends):
        if bounds.start is None:
            assert (start, end) == (0, before + q_length)
        else:
            got = (int(bounds.start[b]), int(bounds.end[b]))
            assert got == (start, end) or (got[0] == got[1] and start == end)  # nothing real
    assert np.array_equal(mask.head_rows(index).numpy(), shown[0][:, :1])
    assert np.array_equal(mask.streaming_rows(index).numpy(), shown[0][:, 0])
    hybrid = mask.streamed(streaming)
    picked = torch.tensor([batch - 1, 0])
    for rows, expected in (
        (hybrid, shown),
        (hybrid.compact(), shown),
        (hybrid.to("cpu"), shown),
        (hybrid.samples(picked), shown[:, [batch - 1, 0]]),
        (hybrid.compact().samples(picked), shown[:, [batch - 1, 0]]),
    ):
        some = torch.arange(q_length).flip(0).expand(rows.batch, -1)  # out of order
        assert np.array_equal(rows.head_rows(some).numpy(), expected[1][:, :, ::-1])
        assert np.array_equal(rows.rows(some).numpy(), expected[0][:, 0, ::-1])
        assert np.array_equal(rows.full().numpy(), expected[0][:, 0])
        far = [h for h in range(streaming.n_heads) if h not in streaming.dense]
        if far:
            assert np.array_equal(rows.streaming_rows(some).numpy(), expected[1][:, far[0], ::-1])
        assert not rows.plain_causal
    assert hybrid.compact().recipe is None and (form == "boolean" or hybrid.compact().dense is None)


NOT_CAUSAL = {
    "vision": of(None, causal=False),
    "window": of(None, window=2),
    "packed": of(None, segments=(2, 1, 3)),
    "holes": of(torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])),
    "boolean": of(by_definition(6, 6, causal=False)[:, None]),
    "by head": of(torch.stack([by_definition(6, 6), by_definition(6, 6, window=2)], dim=1)),
    "a window's recipe": of(transformers_mask("sdpa", 3, None, 6, 6, 0)),
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_heads_stream_under_causal_masks_alone(kind):
    assert NOT_CAUSAL[kind].bounds() is None
    with pytest.raises(UnsupportedModelError, match="need a causal mask.*Use attention='sdpa' there"):
        NOT_CAUSAL[kind].streamed(StreamingHeads((), 2, 1, 2))


def test_a_mask_by_head_shows_each_head_its_own():
    own = torch.stack([by_definition(6, 6), by_definition(6, 6, window=2)], dim=1)
    index = torch.tensor([[4, 0], [5, 1]])
    expected = torch.stack([own[b][:, i] for b, i in enumerate(index)])
    assert torch.equal(of(own).head_rows(index), expected)
    assert torch.equal(of(own).rows(index), expected.any(1))
    assert torch.equal(of(own).samples(torch.tensor([1])).head_rows(index[1:]), expected[1:])


def test_the_padding_is_read_once_for_all_layers(monkeypatch):
    mask = slim_mask("sdpa")(
        batch_size=2, q_length=6, kv_length=6, attention_mask=LEFT.bool(), mask_function=causal_mask_function
    )
    first = of(mask).bounds()
    assert of(mask).bounds() is first


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_a_slim_mask_is_none_or_the_padding_and_of_one_query_what_it_was(base):
    def slim(q_length, kv_length, offset, padding, rule=causal_mask_function):
        return called(slim_mask(base), rule, padding, q_length, kv_length, offset, True)

    real = torch.ones(2, 6, dtype=torch.bool)
    for mask in (None, real):
        got = slim(6, 6, 0, mask)
        assert got is None if base == "sdpa" else torch.equal(got, real)  # eager takes None for "all is seen"
    assert torch.equal(slim(6, 6, 0, LEFT), LEFT.bool())
    assert torch.equal(slim(6, 9, 0, LEFT), LEFT.bool())  # room in a static cache
    assert torch.equal(slim(2, 6, 4, real), real)  # a chunk: None would be read as the prompt's beginning
    one = slim(1, 6, 5, LEFT)
    assert one.shape == (2, 1, 1, 6) and torch.equal(one[:, 0, 0] == (True if base == "sdpa" else 0), LEFT.bool())
    window = slim(6, 6, 0, LEFT, sliding_window_causal_mask_function(3))
    assert window.shape == (2, 1, 6, 6)
