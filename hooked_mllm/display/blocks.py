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
    """A titled block of HTML with its style sheet, for `_repr_html_`; `title` and `note` are escaped, `parts` HTML."""
    remark = f"<p>{escape(note)}</p>" if note else ""
    return f'{_STYLE}\n<div class="hooked-mllm"><p class="title">{escape(title)}</p>{remark}{"".join(parts)}</div>'


def html_table(
    cells: Iterable[Sequence[object]], header: Sequence[object] = (), align: str = "", named: bool = False
) -> str:
    """A table of escaped cells; empty text where there are none.

    `align` has "<" or ">" for each column, "<" where it ends; `named`: the first cell of a line is its name.
    """
    body = "".join(_line(line, align, "th" if named else "td") for line in cells)
    head = f"<thead>{_line(header, align, 'th', 'th')}</thead>" if header and body else ""
    return f"<table>{head}<tbody>{body}</tbody></table>" if body else ""


def _line(line: Sequence[object], align: str, first: str, rest: str = "td") -> str:
    cells, tags = "", [first, *[rest] * (len(line) - 1)]
    for value, tag, side in zip(line, tags, align.ljust(len(line), "<"), strict=False):
        kind = ' class="r"' if side == ">" else ""
        cells += f"<{tag}{kind}>{escape(str(value))}</{tag}>"
    return f"<tr>{cells}</tr>"
