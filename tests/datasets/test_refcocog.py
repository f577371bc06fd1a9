import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
from PIL import Image

from hooked_mllm import HookedMLLM
from hooked_mllm.datasets import RefCOCOg
from hooked_mllm.errors import InputError

DATA = Path(__file__).parents[1] / "data" / "refcocog"
PUBLISHED = [json.loads(line) for line in (DATA / "records.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(DATA, tmp_path / "refcocog"))


def rewrite_refs(folder, change):
    file = folder / "refs(sample).p"
    refs = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(change(refs), protocol=2))


def rewrite_instances(folder, change):
    file = folder / "instances.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_matches_the_flat_list_of_the_same_records():
    with pytest.warns(UserWarning, match="9 of 19 expressions left out"):
        data = RefCOCOg(DATA, "sample", split=None)
    expected = {(r["ann_id"], r["expression"]): r for r in PUBLISHED if r["image_included"]}
    assert {(r.ann_id, r.expression) for r in data} == expected.keys()
    for record in data:
        row = expected[record.ann_id, record.expression]
        x, y, w, h = row["bbox_xywh"]
        box = record.target
        assert (box.x0, box.y0, box.image) == (x, y, 0)
        assert (box.x1 - box.x0, box.y1 - box.y0) == pytest.approx((w, h))
        assert (record.width, record.height) == (row["width"], row["height"])
        assert record.path.name == row["file_name"]
        assert (record.image_id, record.category) == (row["image_id"], row["category"])
        assert record.images[0].size == (record.width, record.height) and record.images[0].mode == "RGB"


def test_the_file_name_that_ends_in_the_annotation_id():
    refs = json.loads((DATA / "refs(sample).json").read_text())
    assert all(not list(DATA.rglob(ref["file_name"])) for ref in refs)  # the trap: no such file
    data = RefCOCOg(DATA, "sample", "test")
    assert len(data) == 9 and data.n_missing == 0
    assert {r.path.parent.name for r in data} == {"train2014", "val2014"}


def test_missing_photographs_are_counted_and_reported():
    with pytest.warns(UserWarning, match=r"9 of 10 expressions left out: 8 photographs are missing, e\.g\. COCO"):
        data = RefCOCOg(DATA, "sample", "val")
    assert (len(data), data.n_missing, len(data.missing_images)) == (1, 9, 8)
    assert data[0].ann_id == 187798 and data[0].id == "refcocog/sample/val/9000006"
    assert "9 left out" in repr(data)


def test_no_photograph_at_all(folder):
    shutil.rmtree(folder / "images")
    with pytest.raises(InputError, match=r"none of the 4 photographs.*COCO_train2014_000000000529\.jpg.*pass images="):
        RefCOCOg(folder, "sample", "test")


@pytest.mark.parametrize("below", ["elsewhere/train2014", "elsewhere"], ids=["with-split-folder", "flat"])
def test_photographs_elsewhere(folder, below):
    target = folder / below
    target.mkdir(parents=True)
    (folder / "images/train2014/COCO_train2014_000000000529.jpg").rename(target / "COCO_train2014_000000000529.jpg")
    shutil.rmtree(folder / "images")
    with pytest.warns(UserWarning, match="7 of 9"):
        data = RefCOCOg(folder, "sample", "test", images=folder / "elsewhere")
    assert [r.image_id for r in data] == [529, 529]


def test_question_template():
    data = RefCOCOg(DATA, "sample", "test", question="Point at {expression}, please.")
    assert data[0].question == f"Point at {data[0].expression}, please."
    assert RefCOCOg(DATA, "sample", "test")[0].question == f"Where is {data[0].expression}?"


def test_question_drops_the_final_period(folder):
    def change(refs):
        refs[10]["sentences"][0]["sent"] = "the red bus."
        return refs

    rewrite_refs(folder, change)
    record = RefCOCOg(folder, "sample", "test")[0]
    assert (record.expression, record.question) == ("the red bus.", "Where is the red bus?")


@pytest.mark.parametrize("template", ["Where?", "{thing}?", "{expression", "{expression} {thing}"])
def test_bad_question_template(template):
    with pytest.raises(InputError, match="question template"):
        RefCOCOg(DATA, "sample", "test", question=template)


def test_max_samples_and_seed():
    everything = RefCOCOg(DATA, "sample", "test")
    assert list(RefCOCOg(DATA, "sample", "test", max_samples=3)) == everything[:3]
    assert len(RefCOCOg(DATA, "sample", "test", max_samples=100)) == 9
    shuffled = RefCOCOg(DATA, "sample", "test", seed=1)
    assert list(shuffled) != list(everything) and sorted(r.id for r in shuffled) == sorted(r.id for r in everything)
    assert list(RefCOCOg(DATA, "sample", "test", seed=1, max_samples=4)) == shuffled[:4]
    with pytest.raises(InputError, match="max_samples >= 1"):
        RefCOCOg(DATA, "sample", "test", max_samples=0)


def test_several_sentences_are_several_records(folder):
    def change(refs):
        refs[10]["sentences"].append({"sent": "the bus", "sent_id": 77, "raw": "The bus", "tokens": ["the", "bus"]})
        return refs

    rewrite_refs(folder, change)
    data = RefCOCOg(folder, "sample", "test")
    assert len(data) == 10
    assert (data[0].ann_id, data[0].target) == (data[1].ann_id, data[1].target)
    assert (data[1].expression, data[1].sent_id) == ("the bus", 77)


def test_box_past_the_edge_by_rounding(folder):
    def change(data):
        row = next(a for a in data["annotations"] if a["id"] == 365995)
        row["bbox"] = [440.0, 100.0, 40.01, 50.0]

    rewrite_instances(folder, change)
    assert RefCOCOg(folder, "sample", "test")[0].target.x1 == 480


@pytest.mark.parametrize("bbox", [[5, 5, 0, 9], [700, 5, 9, 9], [5, 5, float("nan"), 9], [1, 2, 3]])
def test_box_without_area(folder, bbox):
    def change(data):
        next(a for a in data["annotations"] if a["id"] == 365995)["bbox"] = bbox

    rewrite_instances(folder, change)
    with pytest.raises(InputError, match="annotation 365995"):
        RefCOCOg(folder, "sample", "test")


def test_annotation_missing(folder):
    def change(data):
        data["annotations"] = [a for a in data["annotations"] if a["id"] != 365995]

    rewrite_instances(folder, change)
    with pytest.raises(InputError, match=r"needs annotation 365995.*same release"):
        RefCOCOg(folder, "sample", "test")


def test_annotation_of_another_image(folder):
    def change(data):
        next(a for a in data["annotations"] if a["id"] == 365995)["image_id"] = 1

    rewrite_instances(folder, change)
    with pytest.raises(InputError, match="do not belong together"):
        RefCOCOg(folder, "sample", "test")


def test_photograph_of_another_size(folder):
    file = folder / "images/train2014/COCO_train2014_000000000529.jpg"
    Image.new("RGB", (20, 10)).save(file)
    record = next(r for r in RefCOCOg(folder, "sample", "test") if r.image_id == 529)
    with pytest.raises(InputError, match=r"is 20 x 10 px, but its annotation has \d+ x \d+"):
        record.images
    file.write_bytes(b"not a picture")
    with pytest.raises(InputError, match="cannot decode"):
        record.images


def test_bad_folders(folder, tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        RefCOCOg(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"refs\(umd\)\.p is missing.*split_by: sample"):
        RefCOCOg(folder)
    with pytest.raises(InputError, match=r"no split 'dev'. It has test \(9\), val \(10\)"):
        RefCOCOg(folder, "sample", "dev")
    (folder / "instances.json").write_text("{}")
    with pytest.raises(InputError, match="not COCO's instances file"):
        RefCOCOg(folder, "sample", "test")
    (folder / "instances.json").unlink()
    with pytest.raises(InputError, match=r"instances\.json is missing"):
        RefCOCOg(folder, "sample", "test")


@pytest.mark.parametrize("bad", [{}, [], [3], [{"ref_id": 1}]], ids=["dict", "empty", "number", "lacking"])
def test_bad_refs(folder, bad):
    (folder / "refs(sample).p").write_bytes(pickle.dumps(bad, 2))
    with pytest.raises(InputError, match="should"):
        RefCOCOg(folder, "sample", "test")


def test_samples_are_prepared_one_at_a_time():
    class Counter:
        def __init__(self):
            self.model = HookedMLLM.from_pretrained("toy-qwen3-vl", check=False)
            self.calls = 0

        def prepare(self, question, images, target, id):
            self.calls += 1
            return self.model.prepare(question, images=images, target=target, id=id)

    counter, data = Counter(), RefCOCOg(DATA, "sample", "test")
    sample, record = next(data.samples(counter)), data[0]
    assert counter.calls == 1
    assert (sample.question, sample.target, sample.id) == (record.question, record.target, record.id)
    assert sample.images[0].size == (record.width, record.height)


def test_reading_is_quiet_when_complete():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RefCOCOg(DATA, "sample", "test")


# -- what a downloaded folder could lead to ---------------------------------------------------------------------------

PHOTOGRAPH = "COCO_train2014_000000000529.jpg"


def rename_photograph(folder, name):
    def change(data):
        next(image for image in data["images"] if image["id"] == 529)["file_name"] = name

    rewrite_instances(folder, change)


@pytest.mark.parametrize("name", ["../../secret.jpg", "ABSOLUTE", "train2014/../../../secret.jpg", "a\0b", "x" * 5000])
def test_a_photograph_outside_the_folder_is_rejected(folder, tmp_path, name):
    secret = tmp_path / "secret.jpg"
    shutil.copy(folder / "images/train2014" / PHOTOGRAPH, secret)
    rename_photograph(folder, name.replace("ABSOLUTE", str(secret)))
    with pytest.raises(InputError, match=r"which is outside it|cannot be followed"):
        RefCOCOg(folder, "sample", "test")


@pytest.mark.parametrize("link", ["images", "images/train2014", f"images/train2014/{PHOTOGRAPH}"])
def test_links_out_of_the_folder_are_rejected(folder, tmp_path, link):
    outside = (folder / link).rename(tmp_path / "outside")
    (folder / link).symlink_to(outside)
    with pytest.raises(InputError, match=r"which is outside it\. Pass images="):
        RefCOCOg(folder, "sample", "test")
    if link == "images":
        assert len(RefCOCOg(folder, "sample", "test", images=outside)) == 9


@pytest.mark.parametrize("name", ["instances.json", "refs(sample).p"])
def test_a_table_that_is_a_link_is_rejected(folder, tmp_path, name):
    (folder / name).symlink_to((folder / name).rename(tmp_path / name))
    with pytest.raises(InputError, match="which is outside it"):
        RefCOCOg(folder, "sample", "test")


def test_links_in_the_folder_are_followed(folder, tmp_path):
    (folder / "photographs").symlink_to((folder / "images").rename(folder / "stored"))
    (folder / "images").symlink_to("stored")
    (tmp_path / "link").symlink_to(folder)
    assert len(RefCOCOg(tmp_path / "link", "sample", "test")) == 9


@pytest.mark.parametrize("sentence", [{"sent": None, "sent_id": 7}, {"sent": " ", "sent_id": 7}, {"sent_id": 7}, "bus"])
def test_a_sentence_without_text(folder, sentence):
    def change(refs):
        refs[10]["sentences"] = [sentence]
        return refs

    rewrite_refs(folder, change)
    with pytest.raises(InputError, match=r"a sentence of reference \d+ should"):
        RefCOCOg(folder, "sample", "test")


@pytest.mark.parametrize(
    ("table", "field", "value"),
    [
        ("images", "width", None),
        ("images", "height", "480"),
        ("images", "file_name", 7),
        ("annotations", "bbox", None),
        ("annotations", "bbox", [1, 2, 10**400, 4]),
        ("annotations", "bbox", ["1", 2, 3, 4]),
        ("annotations", "category_id", []),
    ],
)
def test_fields_of_another_type(folder, table, field, value):
    def change(data):
        for row in data[table]:
            row[field] = value

    rewrite_instances(folder, change)
    with pytest.raises(InputError, match=r"(image|annotation) \d+.*(should have|expected bbox)"):
        RefCOCOg(folder, "sample", "test")


def test_deeply_nested_json(folder):
    (folder / "instances.json").write_text('{"images": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(InputError, match=r"not COCO's instances file.*RecursionError"):
        RefCOCOg(folder, "sample", "test")
