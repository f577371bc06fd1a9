"""HTML for notebooks: small tables in the colours of the theme, light or dark, with nothing loaded from elsewhere."""

from collections.abc import Iterable, Sequence
from html import escape

# JupyterLab's and VS Code's variables follow their themes; elsewhere the reader's preference decides
_STYLE = """<style>
.hooked-mllm{--ink:var(--jp-ui-font-color1,var(--vscode-editor-foreground,#1f2328));\
--dim:var(--jp-ui-font-color2,var(--vscode-descriptionForeground,#59636e));\
--line:var(--jp-border-color2,var(--vscode-editorWidget-border,#d1d9e0));\
--paper:var(--jp-layout-color0,var(--vscode-editor-background,#fff));\
color:var(--ink);background:var(--paper);font:13px/1.4 var(--jp-ui-font-family,system-ui,sans-serif);\
padding:4px 6px;overflow-x:auto}
@media (prefers-color-scheme:dark){.hooked-mllm{\
--ink:var(--jp-ui-font-color1,var(--vscode-editor-foreground,#e6edf3));\
--dim:var(--jp-ui-font-color2,var(--vscode-descriptionForeground,#9198a1));\
--line:var(--jp-border-color2,var(--vscode-editorWidget-border,#3d444d));\
--paper:var(--jp-layout-color0,var(--vscode-editor-background,#0d1117))}}
.hooked-mllm p{margin:2px 0;color:var(--dim)}
.hooked-mllm p.title{color:var(--ink);font-weight:600}
.hooked-mllm table{border-collapse:collapse;margin:4px 0;border:0;font-size:12px;font-variant-numeric:tabular-nums}
.hooked-mllm table tr{background:none}
.hooked-mllm table th,.hooked-mllm table td{text-align:left;vertical-align:top;padding:1px 10px 1px 0;border:0;\
color:var(--ink);white-space:pre-wrap}
.hooked-mllm table th{font-weight:normal;color:var(--dim);white-space:nowrap}
.hooked-mllm table thead th{border-bottom:1px solid var(--line)}
.hooked-mllm table .r{text-align:right}
.hooked-mllm table.heat td,.hooked-mllm table.heat thead th{text-align:right;padding:1px 4px;min-width:2.2em}
.hooked-mllm img{display:inline-block;margin:4px 6px 4px 0;vertical-align:top;border:1px solid var(--line)}
</style>"""


def html_block(title: str, *parts: str, note: str = "") -> str:
    """A titled block of HTML with its style sheet: what `_repr_html_` returns.

    Args:
        title: One line; it is escaped.
        parts: HTML, from the other functions of this module.
        note: A line below the title; it is escaped.

    Examples:
        >>> html_block("a < b").splitlines()[-1]
        '<div class="hooked-mllm"><p class="title">a &lt; b</p></div>'
    """
    remark = f"<p>{escape(note)}</p>" if note else ""
    return f'{_STYLE}\n<div class="hooked-mllm"><p class="title">{escape(title)}</p>{remark}{"".join(parts)}</div>'


def html_table(
    cells: Iterable[Sequence[object]], header: Sequence[object] = (), align: str = "", named: bool = False
) -> str:
    """A table; every cell is escaped. Empty text where there are no cells.

    Args:
        cells: The lines.
        header: The names of the columns.
        align: "<" or ">" for each column; left where it ends.
        named: Whether the first cell of a line is its name.

    Examples:
        >>> html_table([("L2H4", 0.5)], align="<>")
        '<table><tbody><tr><td>L2H4</td><td class="r">0.5</td></tr></tbody></table>'
    """
    body = "".join(_line(line, align, "th" if named else "td") for line in cells)
    head = f"<thead>{_line(header, align, 'th', 'th')}</thead>" if header and body else ""
    return f"<table>{head}<tbody>{body}</tbody></table>" if body else ""


def _line(line: Sequence[object], align: str, first: str, rest: str = "td") -> str:
    sides = align.ljust(len(line), "<")
    tags = [first, *[rest] * (len(line) - 1)]
    return "<tr>" + "".join(map(_cell, line, tags, sides)) + "</tr>"


def _cell(value: object, tag: str, side: str) -> str:
    kind = ' class="r"' if side == ">" else ""
    return f"<{tag}{kind}>{escape(str(value))}</{tag}>"
