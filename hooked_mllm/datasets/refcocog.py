"""RefCOCOg: photographs, one referring expression and one box each (Mao et al. 2016, arXiv:1511.02283)."""

import json
import re
import string
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image

from hooked_mllm.checks import checked
from hooked_mllm.datasets.plain_pickle import load_plain_pickle
from hooked_mllm.errors import InputError, nearest
from hooked_mllm.heads.counting import check_seed
from hooked_mllm.inputs.sample import Prepares, Sample
from hooked_mllm.layout.regions import Box
from hooked_mllm.storage import inside

QUESTION = "Where is {expression}?"
_REF = {"ref_id": int, "ann_id": int, "image_id": int, "split": str, "sentences": list}
_SENTENCE = {"sent": str, "sent_id": int}
_IMAGE = {"file_name": str, "width": int, "height": int}
_ANNOTATION = {"bbox": list, "image_id": int, "category_id": int}
_ADVICE = "Pass images= with the folder of the photographs, and copy the other files into the folder"
#: folders of the photographs in the releases and the tools built on them, relative to the annotations, and the folder
#: that must contain each once links are followed
_IMAGE_FOLDERS = {"images": ".", "images/mscoco/images": ".", "../images/mscoco/images": "..", ".": "."}


@checked
@dataclass(frozen=True)
class ReferringExpression:
    """One expression about one box of one photograph, with the arguments of `HookedMLLM.prepare`.

    Sizes are in pixels of the photograph; `id` is "refcocog/<splitBy>/<split>/<sent_id>", the other ids are COCO's.

    Attributes:
        expression: The words of the annotator, as published.
        question: The expression in the reader's question template.
        target: The box, in pixels of the photograph.
        category: COCO category of the object.
        ref_id: RefCOCOg's id of the reference to the object.
        sent_id: RefCOCOg's id of this expression.
    """

    path: Path
    expression: str
    question: str
    target: Box
    width: int
    height: int
    category: str
    split: str
    image_id: int
    ann_id: int
    ref_id: int
    sent_id: int
    id: str

    @property
    def images(self) -> list[Image.Image]:
        """The photograph, decoded to RGB at each access and checked against the size in the annotations."""
        try:
            with Image.open(self.path) as image:
                if image.size != (self.width, self.height):  # before its pixels are decoded
                    raise InputError(
                        f"{self.path} is {image.width} x {image.height} px, but its annotation has {self.width} x "
                        f"{self.height}: the boxes would be wrong. Use the photographs at their published size"
                    )
                return [image.convert("RGB")]
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"cannot decode {self.path}: {error}") from error


@checked
class RefCOCOg(Sequence[ReferringExpression]):
    """The published RefCOCOg files: `instances.json`, `refs(<split_by>).p` and the COCO photographs.

    One record for each expression, in the order of the file, with its box as corners. The pickle is read without
    loading any code. Expressions without their photograph are counted in `n_missing` and reported by one warning.

    Args:
        folder: Folder of `instances.json` and `refs(<split_by>).p`.
        split_by: "umd" (train, val, test with disjoint photographs; the usual one) or "google" (train, val).
        split: "train", "val" or "test"; None for all.
        max_samples: Maximum number of expressions.
        seed: Seed of a shuffle before `max_samples` is applied; None keeps the order of the file.
        question: Template with `{expression}`, from which a final period is removed.
        images: Folder of the photographs, with or without `train2014/` below it; by default, `images/` is searched.

    Raises:
        InputError: A file is missing, damaged, of another release or outside its folder once links are followed, or all
            photographs are missing.

    Examples:
        ```python
        data = RefCOCOg("refcocog", split_by="umd", split="val", max_samples=100, seed=0)
        samples = [model.prepare(r.question, images=r.images, target=r.target, id=r.id) for r in data]
        ```
    """

    def __init__(
        self,
        folder: str | Path,
        split_by: str = "umd",
        split: str | None = "val",
        *,
        max_samples: int | None = None,
        seed: int | None = None,
        question: str = QUESTION,
        images: str | Path | None = None,
    ) -> None:
        if max_samples is not None and max_samples < 1:
            raise InputError(f"expected max_samples >= 1 or None, got {max_samples}")
        if seed is not None:
            check_seed(seed)
        try:
            fields = {name for _, name, _, _ in string.Formatter().parse(question) if name is not None}
        except ValueError as error:
            raise InputError(f"the question template {question!r} cannot be parsed: {error}") from error
        if fields != {"expression"}:
            raise InputError(f"expected a question template with {{expression}} and no other field, got {question!r}")
        self.folder, self.split_by, self.split, self.question = Path(folder), split_by, split, question
        refs = _read_refs(self.folder, split_by, split)
        tables = _Tables(self.folder / "instances.json")
        folders = {self.folder / name: self.folder / root for name, root in _IMAGE_FOLDERS.items()}
        if images is not None:
            folders = {Path(images): Path(images)}
        records: list[ReferringExpression] = []
        self.n_missing = 0
        self.missing_images: set[str] = set()
        for ref in refs:
            name = tables.image(ref)["file_name"]
            path = _find_photograph(folders, name)
            if path is None:
                self.n_missing += len(ref["sentences"])
                self.missing_images.add(name)
                continue
            records += _records(ref, tables, path, split_by, question)
        if not records:
            raise InputError(
                f"none of the {len(self.missing_images)} photographs of {self.folder} exists, e.g. "
                f"{min(self.missing_images, default='(no reference at all)')}. "
                f"Looked in {', '.join(map(str, folders))}; "
                f"pass images= with the folder that contains train2014/"
            )
        if self.n_missing:
            warnings.warn(
                f"{self.n_missing} of {self.n_missing + len(records)} expressions left out: "
                f"{len(self.missing_images)} photographs are missing, e.g. {min(self.missing_images)}",
                stacklevel=2,
            )
        if seed is not None:
            records = [records[i] for i in np.random.default_rng(seed).permutation(len(records))]
        self._records = records[:max_samples]

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> ReferringExpression: ...
    @overload
    def __getitem__(self, index: slice) -> list[ReferringExpression]: ...
    def __getitem__(self, index: int | slice) -> ReferringExpression | list[ReferringExpression]:
        return self._records[index]

    def __repr__(self) -> str:
        missing = f", {self.n_missing} left out without their photograph" if self.n_missing else ""
        return f"RefCOCOg({str(self.folder)!r}, {self.split_by!r}, {self.split!r}: {len(self)} expressions{missing})"

    def samples(self, model: Prepares) -> Iterator[Sample]:
        """The samples of a model, one by one: photographs are large."""
        for record in self:
            yield model.prepare(record.question, images=record.images, target=record.target, id=record.id)


class _Tables:
    """The tables of `instances.json`, by id."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise InputError(f"{file} is missing. A RefCOCOg folder contains instances.json and refs(umd).p")
        self.file = inside(file.parent, file.name, advice=_ADVICE)
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            self.images = {image["id"]: image for image in data["images"]}
            self.annotations = {annotation["id"]: annotation for annotation in data["annotations"]}
            self.categories = {category["id"]: category["name"] for category in data["categories"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{file} is not COCO's instances file: expected JSON with images, annotations and categories "
                f"({error!r})"
            ) from error

    def image(self, ref: dict[str, Any]) -> dict[str, Any]:
        """The image of a reference."""
        return self._row(self.images, "image", ref["image_id"], ref, _IMAGE)

    def annotation(self, ref: dict[str, Any]) -> dict[str, Any]:
        """The annotation of a reference."""
        row = self._row(self.annotations, "annotation", ref["ann_id"], ref, _ANNOTATION)
        if row["image_id"] != ref["image_id"]:
            raise InputError(
                f"reference {ref['ref_id']} is of image {ref['image_id']}, its annotation {ref['ann_id']} of image "
                f"{row['image_id']}: {self.file} and the refs file do not belong together"
            )
        return row

    def _row(
        self, table: dict[int, Any], kind: str, key: int, ref: dict[str, Any], fields: Mapping[str, type]
    ) -> dict[str, Any]:
        row = table.get(key)
        if row is None:
            raise InputError(
                f"reference {ref['ref_id']} needs {kind} {key}, which {self.file} does not have: "
                f"the two files must come from the same release"
            )
        return _checked(row, fields, f"{kind} {key} of {self.file}")


def _checked(row: object, fields: Mapping[str, type], what: str) -> dict[str, Any]:
    """The same row of a file, a dict with these fields of these types."""
    if not isinstance(row, dict):
        raise InputError(f"{what} should be a dict with {', '.join(fields)}; it is a {type(row).__name__}")
    for field, expected in fields.items():
        if not isinstance(row.get(field), expected) or (expected is str and not row[field].strip()):
            value = f"{field} {row[field]!r}" if field in row else f"no {field}"
            raise InputError(f"{what} should have {', '.join(fields)}, {field} a {expected.__name__}; it has {value}")
    return row


def _find_photograph(folders: Mapping[Path, Path], name: str) -> Path | None:
    """The path of a photograph by its COCO file name, with or without a folder of its COCO split."""
    split = re.match(r"COCO_([a-z]+\d{4})_", name)
    below = (f"{split[1]}/{name}", name) if split else (name,)
    paths = (inside(folder, path, root=root, advice=_ADVICE) for folder, root in folders.items() for path in below)
    return next((path for path in paths if path.is_file()), None)


def _read_refs(folder: Path, split_by: str, split: str | None) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Expected RefCOCOg's: instances.json, refs(umd).p and images/")
    file = folder / f"refs({split_by}).p"
    if not file.is_file():
        available = sorted(p.name[5:-3] for p in folder.glob("refs(*).p"))
        raise InputError(
            f"{file} is missing. {nearest(split_by, available)} This folder has split_by: "
            f"{', '.join(available) or 'none'}"
        )
    refs = load_plain_pickle(inside(folder, file.name, advice=_ADVICE))
    if not isinstance(refs, list) or not refs:
        raise InputError(f"{file} should contain a list of references; it contains {type(refs).__name__}")
    for i, ref in enumerate(refs):
        _checked(ref, _REF, f"reference {i} of {file}")
    if split is None:
        return refs
    counts = Counter(ref["split"] for ref in refs)
    if split not in counts:
        available = ", ".join(f"{name} ({n})" for name, n in sorted(counts.items()))
        raise InputError(f"{file} has no split {split!r}. It has {available}")
    return [ref for ref in refs if ref["split"] == split]


def _records(
    ref: dict[str, Any], tables: _Tables, path: Path, split_by: str, question: str
) -> Iterator[ReferringExpression]:
    image, annotation = tables.image(ref), tables.annotation(ref)
    box = _corners(annotation, image)
    for sentence in ref["sentences"]:
        _checked(sentence, _SENTENCE, f"a sentence of reference {ref['ref_id']}")
        expression = sentence["sent"].strip()
        yield ReferringExpression(
            path=path,
            expression=expression,
            question=question.format(expression=expression.rstrip(". ")),
            target=box,
            width=image["width"],
            height=image["height"],
            category=str(tables.categories.get(annotation["category_id"], "unknown")),
            **{name: ref[name] for name in ("split", "image_id", "ann_id", "ref_id")},
            sent_id=sentence["sent_id"],
            id=f"refcocog/{split_by}/{ref['split']}/{sentence['sent_id']}",
        )


def _corners(annotation: dict[str, Any], image: dict[str, Any]) -> Box:
    if [type(v) in (int, float) and abs(v) < 1 << 31 for v in annotation["bbox"]] != [True] * 4:
        raise InputError(f"annotation {annotation['id']}: expected bbox (x, y, w, h), got {annotation['bbox']}")
    x, y, w, h = annotation["bbox"]
    # COCO rounds to 0.01 px, so that x + w can exceed the edge by that
    x1, y1 = min(x + w, image["width"]), min(y + h, image["height"])
    x0, y0 = max(x, 0.0), max(y, 0.0)
    if x1 <= x0 or y1 <= y0:
        raise InputError(
            f"annotation {annotation['id']} has no area inside its {image['width']} x {image['height']} px image: "
            f"bbox (x, y, w, h) = {annotation['bbox']}"
        )
    return Box(x0, y0, x1, y1)
