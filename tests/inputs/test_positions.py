"""Positions in every form against lists written in Python and NumPy, and what selects none."""

import inspect
import json
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from helpers.tiny import tiny_frames, tiny_image
from helpers.wrapped import wrapped
from hooked_mllm import AttentionKnockout, Box, Frames, HeadAblation, Mask, Pages, SampleBatch, Steer, Tube
from hooked_mllm.cache import ActivationCache
from hooked_mllm.errors import InputError, LayoutError
from hooked_mllm.inputs.positions import (
    check_every_sample,
    check_positions,
    describe_positions,
    indices_of,
    mask_of,
    resolve_mask,
    resolve_positions,
)
from hooked_mllm.metrics import AblationEffect, AttributionPatching, DuoGate, PatchingEffect
from hooked_mllm.objectives import FunctionObjective, KLDivergence

LENGTH = 7


@cache
def pictured(family: str, text: str = "What is it?", answer: str | None = None):
    """A sample with an image of 40 x 30 and one of 24 x 24 pixels."""
    images = [tiny_image(40, 30), tiny_image(24, 24)]
    return wrapped(family).prepare(text, images=images, target=Box(0, 0, 6, 6), answer=answer)


@cache
def filmed(family: str):
    return wrapped(family).prepare("What is it?", videos=[(tiny_frames(4), 1.0)])


def inside(layout, box, image: int) -> list[bool]:
    """Which tokens of an image share an area with a box, by their corners alone."""
    x0, y0, x1, y1 = layout.boxes.numpy().T
    area = np.clip(np.minimum(x1, box[2]) - np.maximum(x0, box[0]), 0, None)
    area = area * np.clip(np.minimum(y1, box[3]) - np.maximum(y0, box[1]), 0, None)
    return ((area > 1e-9) & (layout.item.numpy() == image)).tolist()


# -- forms that need no layout -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selected", "expected"),
    [
        (3, [3]),
        (-1, [6]),
        (np.int64(2), [2]),
        (torch.tensor(5), [5]),
        ([4, 0, -7], [4, 0, 0]),
        ((1, 2), [1, 2]),
        (range(2, 5), [2, 3, 4]),
        (np.array([6, 5]), [6, 5]),
        (np.arange(4)[::-1], [3, 2, 1, 0]),
        (torch.tensor([1, -2]), [1, 5]),
        (torch.tensor([1, 3], dtype=torch.int32), [1, 3]),
        ([np.int64(1), np.int64(3)], [1, 3]),
        (slice(None), list(range(LENGTH))),
        (slice(1, -1), [1, 2, 3, 4, 5]),
        (slice(None, None, 3), [0, 3, 6]),
        (slice(None, None, -2), [6, 4, 2, 0]),
        ([False, True, False, False, True, False, False], [1, 4]),
        (np.arange(LENGTH) % 3 == 0, [0, 3, 6]),
        (torch.arange(LENGTH) > 4, [5, 6]),
    ],
    ids=repr,
)
def test_one_selection_for_all_samples(selected, expected):
    assert resolve_positions(selected, 2, LENGTH, None).tolist() == [expected] * 2
    flags = [i in expected for i in range(LENGTH)]
    assert resolve_mask(selected, 2, LENGTH, None).tolist() == [flags] * 2


def test_a_selection_for_each_sample():
    index = [[0, -1], [3, 4]]
    for form in (index, np.array(index), torch.tensor(index)):
        assert resolve_positions(form, 2, LENGTH, None).tolist() == [[0, 6], [3, 4]]
    mask = [[i in (1, 2, 5) for i in range(LENGTH)], [i == 3 for i in range(LENGTH)]]
    for form in (mask, np.array(mask), torch.tensor(mask)):
        assert resolve_positions(form, 2, LENGTH, None).tolist() == [[1, 2, 5], [3, -1, -1]]
        assert resolve_mask(form, 2, LENGTH, None).tolist() == mask
    # a sample without any is the caller's concern
    mask[1][3] = False
    assert resolve_positions(mask, 2, LENGTH, None).tolist() == [[1, 2, 5], [-1, -1, -1]]


@given(arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 9))))
@settings(max_examples=60, deadline=None)
def test_masks_and_indices_are_the_same_positions(mask):
    mask[0, 0] = True
    index = indices_of(torch.from_numpy(mask))
    for sample_index, sample_mask in zip(index.tolist(), mask, strict=True):
        expected = np.flatnonzero(sample_mask).tolist()
        assert sample_index == expected + [-1] * (index.shape[1] - len(expected))
    assert torch.equal(mask_of(index, mask.shape[1]), torch.from_numpy(mask))


def test_indices_of_an_unknown_length():
    assert resolve_positions([900, 3], 1, None, None).tolist() == [[900, 3]]
    for selected in (-1, slice(2)):
        with pytest.raises(LayoutError, match="sequence of known length"):
            resolve_positions(selected, 1, None, None)


# -- names and regions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_names_in_a_padded_batch(family, side):
    samples = [pictured(family), pictured(family, "What is it in the left of the picture?")]
    batch = SampleBatch.collate(samples, side)
    inputs = wrapped(family).resolve(batch)
    for name in ("question", "target", "visual", "last"):
        expected = []
        for sample in samples:
            gap = (inputs.length - len(sample)) if side == "left" else 0
            expected.append((np.flatnonzero(sample.mask(name)[0].numpy()) + gap).tolist())
        width = max(map(len, expected))
        assert inputs.positions(name).tolist() == [e + [-1] * (width - len(e)) for e in expected]
        assert torch.equal(inputs.mask(name), batch.mask(name))
    assert torch.equal(inputs.padding, batch.inputs["attention_mask"] == 0)


def test_regions_select_the_tokens_that_see_them(family):
    sample = pictured(family)
    layout, inputs = sample.layout, wrapped(family).resolve(sample)
    box = (3, 2, 17, 11)
    assert inputs.mask(Box(*box)).tolist() == [inside(layout, box, 0)]
    assert inputs.mask(Box(*box, image=1)).tolist() == [inside(layout, box, 1)]
    both = np.array(inside(layout, box, 0)) | np.array(inside(layout, (0, 0, 5, 5), 1))
    assert inputs.mask([Box(*box), Box(0, 0, 5, 5, image=1)]).tolist() == [both.tolist()]
    pixels = np.zeros((24, 24), dtype=bool)
    pixels[2:11, 3:17] = True
    assert inputs.mask(Mask(pixels, image=1)).tolist() == [inside(layout, box, 1)]
    pages = (layout.item == 1) & ~layout.boxes[:, 0].isnan()
    assert torch.equal(inputs.mask(Pages([1]))[0], pages)
    assert inputs.positions(Pages([1])).tolist() == [pages.nonzero()[:, 0].tolist()]


def test_regions_of_a_video(family):
    sample = filmed(family)
    first, last = sample.layout.frame_range.numpy().T
    times, inputs = np.array(sample.layout.items[0].times_s), wrapped(family).resolve(sample)
    shown = np.flatnonzero((times >= 1) & (times <= 2))
    sees = np.array([bool(set(range(a, b + 1)) & set(shown.tolist())) and a >= 0 for a, b in zip(first, last)])  # noqa: B905
    sees &= ~sample.layout.boxes[:, 0].isnan().numpy()
    assert inputs.mask(Frames(1, 2))[0].tolist() == sees.tolist()
    tube = Tube({float(times[0]): (0, 0, 8, 8), float(times[-1]): (0, 0, 8, 8)})
    assert inputs.mask(tube)[0].tolist() == inside(sample.layout, (0, 0, 8, 8), 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_region_of_a_batch_is_that_of_each_sample(family, side):
    samples = [pictured(family), pictured(family, "What is it in the left of the picture?")]
    inputs = wrapped(family).resolve(SampleBatch.collate(samples, side))
    for sample, mask in zip(samples, inputs.mask(Box(3, 2, 17, 11)), strict=True):
        gap = inputs.length - len(sample)
        own = mask[gap:] if side == "left" else mask[: len(sample)]
        assert own.tolist() == inside(sample.layout, (3, 2, 17, 11), 0) and own.sum() == mask.sum()


@torch.no_grad()
def test_every_entry_point_takes_every_form(family):
    """The target by its name, region, mask and indices: the same numbers from all that takes positions."""
    model, sample = wrapped(family), pictured(family, answer="red")
    mask = sample.mask("target")
    forms = ("target", sample.target, [sample.target], mask, mask[0].numpy(), mask[0].tolist(), mask[0].nonzero()[:, 0])
    _, cache = model.run_with_cache(sample)
    results = []
    for form in forms:
        outputs = [cache.pattern(1, queries=form, keys=form), cache.logit_lens(positions=form)]
        outputs += [value for _, value in sorted(model.run_with_cache(sample, "*hook_z", pos_slice=form)[1].items())]
        interventions = [
            HeadAblation([(0, 1)], mode="zero", phase="prefill", positions=form),
            Steer(torch.ones(model.cfg.d_model), 0, form, phase="prefill"),
            AttentionKnockout(layers=1, queries="last", keys=form, phase="prefill"),
        ]
        for intervention in interventions:
            with model.intervene(intervention):
                outputs.append(model(sample))
        outputs.append(KLDivergence(form).bind(model, model.resolve(sample)).positions)
        reference = HeadAblation.reference(model, sample, [(0, 1)], positions=form)
        outputs.append(reference.mean.nan_to_num())
        effect = AblationEffect(mode="zero", phase="prefill", positions=form, layers=0)
        goal = FunctionObjective(lambda logits: logits[:, 0, :9].sum(-1))
        outputs.append(effect.run(model, sample, objective=goal, progress=False).values.nan_to_num())
        results.append(outputs)
    for outputs in results[1:]:
        for output, expected in zip(outputs, results[0], strict=True):
            assert torch.equal(output, expected)
    assert all(bool(output.abs().max() > 0) for output in results[0])


def test_a_cache_from_a_file_has_names_and_no_regions(family, tmp_path):
    model, sample = wrapped(family), pictured(family)
    model.run_with_cache(sample, "*hook_pattern")[1].save(tmp_path / "cache.safetensors")
    cache = ActivationCache.load(tmp_path / "cache.safetensors")
    assert cache.pattern(0, keys="target").shape[-1] == int(sample.mask("target").sum())
    for region in (sample.target, [sample.target], Tube({0.0: (0, 0, 4, 4)})):
        with pytest.raises(LayoutError, match="keeps no positions of kind"):
            cache.pattern(0, keys=region)


# -- what selects nothing ------------------------------------------------------------------------------------------

NEITHER = r"expected the name of a token kind such as 'question', a mask .*, indices, a slice, or a region \(Box"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, f"Positions None: {NEITHER}.*; got NoneType"),
        (3.5, f"Positions 3.5: {NEITHER}.*; got float"),
        (True, f"Positions True: {NEITHER}.*; got bool"),
        (b"last", f"{NEITHER}.*; got bytes"),
        ({1, 2}, f"{NEITHER}.*; got set"),
        ({"question": 1}, f"{NEITHER}.*; got dict"),
        (["question"], f"{NEITHER}.*; got a list of something else"),
        ([[1, 2], [3]], f"{NEITHER}.*; got a list of something else"),
        ([Box(0, 0, 1, 1), 3], f"{NEITHER}.*; got a list of something else"),
        ([0.5, 1.0], r"got numbers of torch.float64: give mask.bool\(\) for a mask"),
        (torch.zeros(1, LENGTH), r"torch.float32 of shape \[1, 7\].*give mask.bool\(\)"),
        (torch.tensor(True), "got one truth value"),
        (np.array(1j), "got numbers of torch.complex128"),
    ],
    ids=repr,
)
def test_what_is_none_of_these_is_rejected_in_every_run_and_before(wrong, message):
    for resolver in (resolve_positions, resolve_mask):
        with pytest.raises(LayoutError, match=message):
            inspect.unwrap(resolver)(wrong, 1, LENGTH, None)
    with pytest.raises(LayoutError, match=message):
        inspect.unwrap(check_positions)(wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([0, LENGTH], r"Positions \[0, 7\]: outside a sequence of 7 tokens. Give indices from -7 to 6"),
        (-LENGTH - 1, "Positions -8: outside a sequence of 7 tokens"),
        (list(range(100)), r"Positions \[0, 1, .*\.\.\.: outside a sequence"),
        (torch.ones(2, 3, dtype=torch.bool), r"mask must be \[pos\] or \[batch pos\], here \[2, 7\]; got \[2, 3\]"),
        (torch.ones(3, LENGTH, dtype=torch.bool), r"here \[2, 7\]; got \[3, 7\]"),
        (torch.ones(2, 1, LENGTH, dtype=torch.bool), r"here \[2, 7\]; got \[2, 1, 7\]"),
        (torch.zeros(3, 2, dtype=torch.long), r"indices must be \[n\] or \[batch n\] of 2 samples; got \[3, 2\]"),
        (torch.zeros(2, 1, 1, dtype=torch.long), r"got \[2, 1, 1\]"),
        ([0, 1, 0, 0, 1, 1, 0], r"zeros and ones, one for each position, read like a mask: give mask.bool\(\)"),
        ([], r"Positions \[\]: there is no index. Select at least one position"),
        (torch.zeros(2, 0, dtype=torch.long), "there is no index"),
        (slice(5, 5), "the slice is empty in a sequence of 7 tokens"),
        (slice(0, 4, 0), "slice step cannot be zero. Give whole numbers"),
        (slice("a", None), "slice indices must be integers"),
        (torch.zeros(LENGTH, dtype=torch.bool), "the mask is False everywhere"),
        ("question", "Positions 'question': these inputs have no token layout. Use `model.prepare`"),
        (Box(0, 0, 1, 1), r"Positions Box\(.*these inputs have no token layout"),
    ],
    ids=repr,
)
def test_what_a_sequence_does_not_have_is_rejected(wrong, message):
    for resolver in (resolve_positions, resolve_mask):
        with pytest.raises(LayoutError, match=message):
            resolver(wrong, 2, LENGTH, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: HeadAblation([(0, 1)], mode="zero", phase="prefill", positions=p),
        lambda p: Steer(torch.ones(32), 0, p),
        lambda p: AttentionKnockout(layers=0, queries=p, keys="visual", phase="prefill"),
        lambda p: KLDivergence(p),
        lambda p: FunctionObjective(len, p),
        lambda p: DuoGate(positions=p),
        lambda p: PatchingEffect("z", positions=p),
        lambda p: AttributionPatching("z", positions=p),
    ],
    ids=["ablation", "steer", "knockout", "kl", "function", "duo gate", "patching", "attribution"],
)
def test_settings_with_no_positions_are_rejected_when_they_are_made(make):
    with pytest.raises(LayoutError, match=f"{NEITHER}.*; got numbers of torch.float32"):
        make(torch.tensor([0.5, 2.0]))


def test_a_mapping_has_no_regions(family):
    sample = pictured(family)
    inputs = wrapped(family).resolve(dict(sample.inputs))
    assert torch.equal(inputs.mask("visual"), sample.mask("visual"))
    for kind in ("question", sample.target, [sample.target]):
        with pytest.raises(LayoutError, match="mapping of model inputs has no token layout: .*Make a sample"):
            inputs.mask(kind)


def test_regions_that_no_token_sees(family):
    inputs = wrapped(family).resolve(pictured(family))
    with pytest.raises(LayoutError, match="There is no image 4"):
        inputs.mask(Pages([4]))
    with pytest.raises(LayoutError, match="lies outside image 0"):
        inputs.positions(Box(90, 90, 99, 99))
    with pytest.raises(LayoutError, match="no visual tokens"):
        wrapped(family).resolve(wrapped(family).prepare("What?")).mask(Box(0, 0, 4, 4))


def test_the_vision_tower_has_no_names():
    for selected in ("visual", Box(0, 0, 4, 4), [Box(0, 0, 4, 4)]):
        with pytest.raises(LayoutError, match=r"vision tower have no names.*model\.vision_positions"):
            HeadAblation([(0, 1)], mode="zero", phase="prefill", tower="vision", positions=selected)


def test_inputs_that_continue_from_a_cache_of_keys_have_no_positions():
    inputs = wrapped("internvl").resolve({"input_ids": torch.tensor([[40]]), "past_key_values": object()})
    with pytest.raises(InputError, match="continue from `past_key_values`: give the whole sequence"):
        inputs.check_whole()
    wrapped("internvl").resolve({"input_ids": torch.tensor([[40]])}).check_whole()


def test_every_sample_needs_one():
    check_every_sample(torch.tensor([True, True]), "target")
    with pytest.raises(LayoutError, match="The 'target' mask is empty for sample 1 of the batch"):
        check_every_sample(torch.tensor([True, False, False]), "target")
    with pytest.raises(LayoutError, match="The given mask is empty for sample 0"):
        check_every_sample(torch.tensor([False]), torch.zeros(1, 4, dtype=torch.bool))


def test_records_of_positions_are_json():
    records = {
        "last": "last",
        "index": 3,
        "slice": slice(1, None, 2),
        "list": [1, -2],
        "tensor": torch.tensor([[1, 2]]),
        "array": np.array([4]),
        "mask": torch.tensor([[True, False], [True, True]]),
        "box": Box(0, 0, 4, 4),
        "regions": [Box(0, 0, 4, 4), Pages([1])],
        "all": None,
    }
    described = {name: describe_positions(selected) for name, selected in records.items()}
    assert json.loads(json.dumps(described)) == {
        "last": "last",
        "index": 3,
        "slice": "1:None:2",
        "list": [1, -2],
        "tensor": [[1, 2]],
        "array": [4],
        "mask": {"mask": [2, 2], "positions": 3},
        "box": "Box(x0=0, y0=0, x1=4, y1=4, image=0)",
        "regions": ["Box(x0=0, y0=0, x1=4, y1=4, image=0)", "Pages(images=(1,))"],
        "all": None,
    }
