"""The README's and the manual's code runs as printed, and what is generated from the code is up to date."""

import doctest
import importlib
import json
import pkgutil
import re
from contextlib import chdir
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import hooked_mllm
from hooked_mllm import corruptions, metrics, toys

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
MODULES = sorted(m.name for m in pkgutil.walk_packages(hooked_mllm.__path__, "hooked_mllm."))


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@cache
def names_after(page):
    """The names that a page's code defines, run from the first block to the last in a new folder."""
    text, names = page.read_text(encoding="utf-8"), {"__name__": "page"}
    with TemporaryDirectory() as folder, chdir(folder):
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1))
            exec(compile("\n" * line + match[1], str(page), "exec"), names)  # errors then have the page's own line
    return names


# on a CPU the code of a page is right without implementation="naive"
@pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_code_on_the_page_runs(page):
    assert names_after(page)


@pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")
@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_the_first_pages_mark_the_object_of_their_question(page):
    names = names_after(ROOT / page)
    model, sample, example = names["model"], names["sample"], names["example"]
    assert (sample.question, sample.target) == (example.question, example.target)
    assert example.shape in sample.question

    def color(inputs):
        return model.processor.tokenizer.decode(model(inputs)[0, -1].argmax())

    assert color(sample) == example.answer != color(corruptions.MeanRegion()(model, sample))  # the box has the evidence
    planted = sorted(json.loads((toys.path("toy-qwen3-vl") / "training.json").read_text(encoding="utf-8"))["planted"])
    ram = model.measure(sample, metrics.RetrievalAttentionMass(), progress=False)
    for heads in (ram.top(4), names["core"]):
        assert sorted(str(heads).split(", ")) == planted


def test_the_readme_keeps_its_promises():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    metric = next(b for b in blocks(ROOT / "README.md") if "HeadMetric" in b)
    assert sum(bool(line.strip()) for line in metric.splitlines()) <= 10  # "your own metric in ten lines"
    for name in ("main-job", "tests"):  # what .ci/run runs
        assert re.search(rf"^<!-- {name} -->\n```bash\n[^\n]+\n```$", text, re.MULTILINE)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    finder = doctest.DocTestFinder(exclude_empty=True)
    for example in finder.find(module, name):
        result = doctest.DocTestRunner(optionflags=flags).run(example)
        assert result.failed == 0, f"{example.name}: see the output above"


def test_docstrings_use_sections_that_the_manual_renders():
    """Google style as the manual's build reads it: under another name, an example is quoted prose, not code."""
    sources = sorted((ROOT / "hooked_mllm").rglob("*.py"))
    assert len(sources) > 50
    found = [
        path.name for path in sources if re.search(r"^ +Example:$", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert not found, f"write Examples: in {', '.join(found)}"


def test_every_hook_point_is_listed_with_its_shape():
    page = importlib.import_module("helpers.hook_points_page").page()
    assert (ROOT / "docs" / "hook-points.md").read_text(encoding="utf-8") == page, (
        "run `PYTHONPATH=tests python -m helpers.hook_points_page` to write the page again"
    )
