"""The synthetic task: the same in every process, and its targets are where the shapes are drawn."""

import numpy as np
import pytest

from hooked_mllm import HookedMLLM
from hooked_mllm.errors import InputError
from hooked_mllm.toys import VisualRetrieval
from hooked_mllm.toys.render import BACKGROUND, COLOR_JITTER, NOISE, sprites
from hooked_mllm.toys.vocabulary import COLORS, FILLER, SHAPES, TEMPLATES


def pixels(example, page):
    return np.asarray(example.images[page]).astype(int)


def cells(image):
    """`[row col 16 16 3]`."""
    return image.reshape(6, 16, 6, 16, 3).transpose(0, 2, 1, 3, 4)


def shape_in(cell):
    """The shape whose sprite overlaps best with what is not grey, and the overlap (intersection over union)."""
    drawn = np.abs(cell - BACKGROUND).max(-1) > NOISE + 8
    bank = sprites() > 0.2
    overlap = (bank & drawn).sum((-1, -2)) / (bank | drawn).sum((-1, -2))
    best = overlap.max(1)
    return SHAPES[int(best.argmax())], float(best.max())


def color_in(cell, shape):
    """The colour word nearest to the median of the pixels that differ from the grey."""
    drawn = np.abs(cell - BACKGROUND).max(-1) > NOISE + 8
    shade = np.median(cell[drawn], axis=0)
    return min(COLORS, key=lambda name: np.abs(shade - COLORS[name]).max())


def test_an_example_depends_on_seed_split_and_index_only():
    a, b = VisualRetrieval(seed=3, pages=2), VisualRetrieval(seed=3, pages=2)
    b.example(5)  # earlier examples have no effect
    first, again = a.example(7), b.example(7)
    assert (first.question, first.system, first.answer, first.target, first.id) == (
        (again.question, again.system, again.answer, again.target, again.id)
    )
    assert all((pixels(first, p) == pixels(again, p)).all() for p in range(2))


@pytest.mark.parametrize("other", [{"seed": 4}, {"split": "train"}])
def test_seeds_and_splits_share_no_example(other):
    a, b = VisualRetrieval(seed=3, pages=1), VisualRetrieval(**{"seed": 3, "pages": 1} | other)
    seen = {pixels(e, 0).tobytes() for e in a.examples(20)}
    assert len(seen) == 20
    assert not seen & {pixels(e, 0).tobytes() for e in b.examples(20)}


@pytest.mark.parametrize("pages", [1, 2, 4])
def test_the_target_is_where_the_shape_is_drawn_and_its_color_is_the_answer(pages):
    for example in VisualRetrieval(seed=1, pages=pages).examples(12):
        box = example.target
        assert (box.x1 - box.x0, box.y1 - box.y0) == (16, 16)
        cell = pixels(example, box.image)[box.y0 : box.y1, box.x0 : box.x1]
        shape, overlap = shape_in(cell)
        assert (shape, color_in(cell, shape)) == (example.shape, example.answer)
        assert overlap > 0.85
        assert example.shape in example.question.lower().split("?")[0].replace(".", "").split()


def test_sixteen_shapes_each_once_and_elsewhere_only_grey_noise():
    for example in VisualRetrieval(seed=2, pages=4).examples(4):
        found = []
        for page in range(4):
            for row in cells(pixels(example, page)):
                for cell in row:
                    if np.abs(cell - BACKGROUND).max() > NOISE:
                        found.append(shape_in(cell)[0])
        assert len(found) == len(set(found)) == 16


def test_fewer_objects_are_fewer_shapes_on_the_page():
    task = VisualRetrieval(seed=2, pages=1, objects=5)
    example = task.example(0)
    drawn = [cell for row in cells(pixels(example, 0)) for cell in row if np.abs(cell - BACKGROUND).max() > NOISE]
    assert len(drawn) == 5
    assert example.id != VisualRetrieval(seed=2, pages=1).example(0).id
    assert repr(task).endswith("objects=5)")


def test_shades_stay_near_their_color():
    for example in VisualRetrieval(seed=5, pages=1).examples(8):
        box = example.target
        cell = pixels(example, 0)[box.y0 : box.y1, box.x0 : box.x1]
        near = np.abs(cell - COLORS[example.answer]).max(-1) <= COLOR_JITTER + NOISE
        assert near.sum() >= 20


def test_questions_filler_and_answers_use_the_whole_range():
    examples = list(VisualRetrieval(seed=0, pages=1, filler=5).examples(200))
    assert {e.answer for e in examples} == set(COLORS)
    assert {e.shape for e in examples} == set(SHAPES)
    assert {e.question.replace(e.shape, "{}") for e in examples} == set(TEMPLATES)
    words = [e.system.split() for e in examples]
    assert {len(w) for w in words} == {5}
    assert {w for line in words for w in line} == set(FILLER)
    assert VisualRetrieval(filler=0).example(0).system is None  # what `prepare` takes for no system text


def test_turns_of_a_scene_have_different_shapes_and_begin_with_the_example():
    task = VisualRetrieval(seed=6, pages=2)
    scene, example = task.scene(3, turns=16), task.example(3)
    assert len({t.shape for t in scene.turns}) == len({t.target for t in scene.turns}) == 16
    first = scene.turns[0]
    assert (first.question, first.answer, first.target) == (example.question, example.answer, example.target)
    assert task.scene(3, turns=4).turns == scene.turns[:4]


def test_shapes_can_be_distinguished():
    bank = sprites()[:, 0] > 0.5
    for a in range(len(SHAPES)):
        for b in range(a):
            assert (bank[a] & bank[b]).sum() / (bank[a] | bank[b]).sum() < 0.9, (SHAPES[a], SHAPES[b])


@pytest.mark.parametrize("wrong", [{"pages": 0}, {"filler": -1}, {"seed": -1}])
def test_impossible_settings_are_rejected(wrong):
    with pytest.raises(InputError, match="expected pages >= 1"):
        VisualRetrieval(**wrong)


def test_an_impossible_scene_is_rejected():
    with pytest.raises(InputError, match="1 <= turns <= 16"):
        VisualRetrieval().scene(0, turns=17)
    with pytest.raises(InputError, match="1 <= turns <= 3"):
        VisualRetrieval(objects=3).scene(0, turns=4)
    with pytest.raises(InputError, match="1 <= objects <= 16"):
        VisualRetrieval(objects=17)
    with pytest.raises(InputError, match="index >= 0"):
        VisualRetrieval().scene(-1)


def test_samples_go_through_prepare():
    class Recorder:
        """Passes its arguments to a model's `prepare`, and keeps them."""

        def __init__(self):
            self.model = HookedMLLM.from_pretrained("toy-qwen3-vl", check=False)
            self.calls = []

        def prepare(self, question, **kwargs):
            self.calls.append((question, kwargs))
            return self.model.prepare(question, **kwargs)

    task, recorder = VisualRetrieval(pages=2, filler=4), Recorder()
    samples = task.samples(recorder, 2, start=9)
    example = task.example(9)
    assert [sample.id for sample in samples] == [example.id, task.example(10).id]
    question, given = recorder.calls[0]
    assert question == samples[0].question == example.question
    assert len(given["images"]) == 2
    assert given["system"] == example.system
    assert given["target"] == example.target
    assert given["answer"] is None
    assert given["id"] == example.id
    assert task.samples(recorder, 1, answer=True)[0].answer == task.example(0).answer
