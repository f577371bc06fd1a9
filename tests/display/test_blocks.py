from helpers.html import Page
from hooked_mllm.display.blocks import html_block, html_table

HOSTILE = "<script>alert('x')</script> & \"quoted\""


def test_everything_is_escaped():
    html = html_block(HOSTILE, html_table([(HOSTILE, 1)], (HOSTILE, "b"), named=True), note=HOSTILE)
    page = Page(html)
    assert "script" not in page.tags and page.texts.count(HOSTILE) == 4


def test_both_themes_and_nothing_from_elsewhere():
    html = html_block("title")
    light, dark = html.split("@media (prefers-color-scheme:dark)")
    for variable in ("--jp-ui-font-color1", "--jp-ui-font-color2", "--jp-border-color2", "--jp-layout-color0"):
        assert f"var({variable}," in light and f"var({variable}," in dark
    assert "#fff" in light and "#0d1117" in dark
    assert "http" not in html and "url(" not in html and "@import" not in html


def test_cells_names_and_sides():
    table = html_table([("L0", 1), ("L1", 2)], ("layer", "n"), align="<>", named=True)
    page = Page(table)
    assert page.texts == ["layer", "n", "L0", "1", "L1", "2"]
    assert page.tags.count("th") == 4 and page.tags.count("td") == 2
    assert [tag for tag, name, value in page.attributes if (name, value) == ("class", "r")] == ["th", "td", "td"]


def test_a_table_without_lines_is_left_out():
    assert html_table([], ("a", "b")) == ""
    assert Page(html_block("empty", html_table([]))).texts == ["empty"]
