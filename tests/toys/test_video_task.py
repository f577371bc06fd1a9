"""The video task: the same in every process, and its target is the one moment and place that shows the shape."""

import numpy as np
import pytest

from hooked_mllm import HookedMLLM
from hooked_mllm.errors import InputError
from hooked_mllm.toys import VideoRetrieval, VisualRetrieval
from hooked_mllm.toys.render import BACKGROUND, NOISE, sprites
from hooked_mllm.toys.vocabulary import COLORS, FILLER, SHAPES

VISIBLE = sprites(2) > 0.2


def drawn_cells(frame):
    """The shape and the colour word of each cell of 32 px that is not grey noise: {(row, col): (shape, colour)}."""
    found = {}
    for row in range(3):
        for col in range(3):
            cell = frame[row * 32 : (row + 1) * 32, col * 32 : (col + 1) * 32].astype(int)
            if np.abs(cell - BACKGROUND).max() <= NOISE:
                continue
            drawn = np.abs(cell - BACKGROUND).max(-1) > NOISE + 8
            overlap = (VISIBLE & drawn).sum((-1, -2)) / (VISIBLE | drawn).sum((-1, -2))
            shade = np.median(cell[drawn], axis=0)
            color = min(COLORS, key=lambda name: np.abs(shade - COLORS[name]).max())
            found[row, col] = SHAPES[int(overlap.max(1).argmax())], color
    return found


@pytest.mark.parametrize("moments", [1, 4])
def test_the_target_is_the_only_moment_and_cell_that_shows_the_shape(moments):
    for example in VideoRetrieval(seed=1, moments=moments).examples(8):
        frames, target = example.video.frames, example.target
        assert frames.shape == (2 * moments, 96, 96, 3)
        shown = [
            (time, cell, color)
            for time, frame in zip(example.video.times_s, frames, strict=True)
            for cell, (shape, color) in drawn_cells(frame).items()
            if shape == example.shape
        ]
        cell = (int(target.box[1]) // 32, int(target.box[0]) // 32)
        assert target.box == (cell[1] * 32, cell[0] * 32, cell[1] * 32 + 32, cell[0] * 32 + 32)
        assert shown == [(time, cell, example.answer) for time in (target.start_s, target.end_s)]
        assert int(target.start_s) == target.start_s
        assert target.end_s == target.start_s + 0.5
        assert example.shape in example.question.lower().replace("?", "").replace(".", "").split()


def test_every_moment_shows_its_own_shapes_in_two_frames_that_differ_in_noise():
    for example in VideoRetrieval(seed=2, moments=3, shapes=5).examples(4):
        shapes = []
        for first, second in example.video.frames.reshape(3, 2, 96, 96, 3):
            assert drawn_cells(first) == drawn_cells(second)
            difference = np.abs(first.astype(int) - second)
            assert 0 < difference.mean() < NOISE
            assert difference.max() <= 2 * NOISE
            shapes += [shape for shape, _ in drawn_cells(first).values()]
        assert len(shapes) == len(set(shapes)) == 15


def test_an_example_depends_on_seed_split_and_index_only():
    a, b = VideoRetrieval(seed=3), VideoRetrieval(seed=3)
    b.example(5)  # earlier examples have no effect
    first, again = a.example(7), b.example(7)
    assert (first.video.frames == again.video.frames).all()
    assert (first.question, first.system, first.answer, first.target, first.id) == (
        (again.question, again.system, again.answer, again.target, again.id)
    )
    for other in (VideoRetrieval(seed=4), VideoRetrieval(seed=3, split="train")):
        assert not (other.example(7).video.frames == first.video.frames).all()
        assert other.example(7).id != first.id
    assert repr(a) == "VideoRetrieval(seed=3, moments=4, filler=48, split='test', shapes=4)"


def test_turns_of_a_scene_have_different_shapes_and_begin_with_the_example():
    task = VideoRetrieval(seed=6, moments=2, filler=5)
    scene, example = task.scene(3, turns=8), task.example(3)
    assert len({t.shape for t in scene.turns}) == len({(t.part, t.cell) for t in scene.turns}) == 8
    assert {t.part for t in scene.turns} == {0, 1}
    first = scene.turns[0]
    assert (first.question, first.answer, first.target) == (example.question, example.answer, example.target)
    assert len(example.system.split()) == 5
    assert set(example.system.split()) <= set(FILLER)


def test_the_places_of_pages_are_counted_like_their_boxes():
    for turn in VisualRetrieval(seed=6, pages=3).scene(0, turns=16).turns:
        row, col = divmod(turn.cell, 6)
        assert (turn.target.image, turn.target.y0, turn.target.x0) == (turn.part, row * 16, col * 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"moments": 0}, "expected moments >= 1"),
        ({"filler": -1}, "expected moments >= 1"),
        ({"shapes": 10, "moments": 1}, "expected 1 <= shapes <= 9"),
        ({"shapes": 6, "moments": 4}, "at most 20 in total"),
    ],
)
def test_impossible_settings_are_rejected(wrong, message):
    with pytest.raises(InputError, match=message):
        VideoRetrieval(**wrong)


def test_an_impossible_scene_is_rejected():
    with pytest.raises(InputError, match="1 <= turns <= 8"):
        VideoRetrieval(moments=2).scene(0, turns=9)
    with pytest.raises(InputError, match="index >= 0"):
        VideoRetrieval().scene(-1)


@pytest.mark.parametrize(("name", "tokens"), [("toy-qwen3-vl", 4), ("toy-llava-onevision", 2), ("toy-internvl", 2)])
def test_samples_hold_the_moment_and_every_word_is_known(name, tokens):
    model = HookedMLLM.from_pretrained(name, dtype="float32")
    task = VideoRetrieval(seed=9, moments=4, filler=4)
    for sample, example in zip(task.samples(model, 4, start=2, answer=True), task.examples(4, start=2), strict=True):
        assert sample.mask("target").sum() == tokens
        assert (sample.id, sample.answer) == (example.id, example.answer)
        assert sample.layout.target(example.target)[sample.mask("target")[0]].all()
        assert model.processor.tokenizer.unk_token_id not in sample.inputs["input_ids"]
    visual = model.prepare(example.question, videos=example.video).mask("visual").sum()
    assert visual == {"toy-qwen3-vl": 4 * 36, "toy-llava-onevision": 8 * 9 + 1, "toy-internvl": 8 * 9}[name]
