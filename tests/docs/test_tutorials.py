"""The tutorials run, and their results are those of their text; the build of the manual makes the outputs."""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urljoin

import pytest

ROOT = Path(__file__).parents[2]
BOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
PLANTED = {(2, 4), (2, 5), (2, 6), (2, 7)}


def cells(book, kind):
    data = json.loads(book.read_text(encoding="utf-8"))
    return [(i, "".join(c["source"])) for i, c in enumerate(data["cells"]) if c["cell_type"] == kind]


@cache
def names_after(stem):
    """The names that the cells of a notebook define, run in order."""
    book, names = ROOT / "docs" / "tutorials" / f"{stem}.ipynb", {"__name__": "__main__"}
    for index, source in cells(book, "code"):
        exec(compile(source, f"{book.name}, cell {index}", "exec"), names)
    return names


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_notebooks_run_from_top_to_bottom(book, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_after(book.stem)
    assert not [*tmp_path.iterdir()]  # nothing is written to the working folder


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_notebooks_have_no_outputs_and_state_that_the_toy_was_planted(book):
    data = json.loads(book.read_text(encoding="utf-8"))
    code = [c for c in data["cells"] if c["cell_type"] == "code"]
    assert code and not any(c["outputs"] or c["execution_count"] for c in code)
    text = "\n".join(source for _, source in cells(book, "markdown"))
    assert "planted" in text
    assert f"tutorials/{book.name}" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@cache
def notebook_links():
    """The hook of mkdocs.yml, without mkdocs."""
    (path,) = re.findall(r"^hooks: \[(.+)\]$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    spec = importlib.util.spec_from_file_location("notebook_links", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def site():
    """The files of the manual by path, with the address of each page."""
    sources = re.findall(r"([\w/-]+\.(?:md|ipynb))$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    addresses = {s: re.sub(r"(^|/)index/$", r"\1", s.rsplit(".", 1)[0] + "/") or "./" for s in sources}
    return {source: SimpleNamespace(src_uri=source, url=url) for source, url in addresses.items()}


def on_site(html, source):
    files = SimpleNamespace(get_file_from_path=site().get)
    page = SimpleNamespace(file=site()[source])
    return notebook_links().on_page_content(html, page=page, config=None, files=files)


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_links_exist_in_the_folder_and_on_the_site(book, caplog):
    source = f"tutorials/{book.name}"
    links = [link for _, text in cells(book, "markdown") for link in re.findall(r"\]\(([^):]+)\)", text)]
    assert links
    for link in links:
        path = link.split("#")[0]
        assert (book.parent / path).exists(), link
        (link_on_site,) = re.findall('href="([^"#]*)', on_site(f'<a href="{link}">', source))
        address = urljoin("https://site/" + site()[source].url, link_on_site)
        assert address.removeprefix("https://site/") in {page.url for page in site().values()}, link
    assert not caplog.records


def test_links_of_notebooks_become_links_to_pages(caplog):
    source = "tutorials/03_ablation.ipynb"
    links = ["04_activation_patching.ipynb", "../objectives.md#values", "../index.md", "../metrics/index.md"]
    pages = ["../04_activation_patching/", "../../objectives/#values", "../../", "../../metrics/"]
    assert [on_site(f'<a href="{link}">', source) for link in links] == [f'<a href="{page}">' for page in pages]
    for other in ("https://a.org/b.md", "#here.md", "/c.md", "picture.png", "mailto:a@b.md"):
        assert on_site(f'<a href="{other}">', source) == f'<a href="{other}">'
    assert on_site('<a href="cli.md">', "index.md") == '<a href="cli.md">'  # mkdocs rewrites links of Markdown pages
    assert not caplog.records
    assert on_site('<a href="05_gone.ipynb">', source) == '<a href="05_gone.ipynb">'
    assert "tutorials/03_ablation.ipynb links to 05_gone.ipynb, which is no page" in caplog.text


def test_a_first_look_finds_the_planted_heads():
    names = names_after("01_first_look")
    assert set(names["core"]) == PLANTED
    assert names["example"].answer == names["answer"](names["sample"])
    with names["model"].intervene(names["HeadAblation"](names["core"], mode="zero", phase="prefill")):
        assert names["answer"](names["sample"]) != names["example"].answer


def test_the_metrics_of_the_second_tutorial_agree_on_the_planted_heads():
    names = names_after("02_your_own_metric")
    assert set(names["share"].top(4)) == set(names["ram"].top(4)) == PLANTED
    assert PLANTED & set(names["sharpness"].top(4)) and 0 < names["ram"].spearman(names["share"]) < 1


def test_the_third_tutorial_ablates_the_heads_that_the_answer_needs():
    names = names_after("03_ablation")
    assert set(names["sets"]["top"]) == set(names["effect"].top(4)) == PLANTED
    result = names["result"]
    assert result.at("top", 0) == 1 == result.at("bottom", 12) and result.at("top", 4) < 0.5
    ablation = names["HeadAblation"]
    whole, without = (
        names["measure"](ablation(names["sets"]["top"], mode="zero", phase=phase)) for phase in ("decode", "both")
    )
    assert whole == names["measure"]() != without  # "decode" has no effect on an answer of one token


def test_the_fourth_tutorial_follows_the_difference_through_the_planted_heads():
    names = names_after("04_activation_patching")
    for scores in ("denoising", "noising", "first_order", "integrated"):
        assert set(names[scores].top(4)) == PLANTED, scores
    table = names["table"]
    assert table[0, "target"] < 0.5 < table[2, "target"] and table[3, "target"] < 0.5 < table[3, "template"]
