"""What `model.intervene` yields: plain lists and dicts that a notebook shows as tables."""

import json
from collections.abc import Mapping
from typing import Any

from hooked_mllm.display.blocks import html_block, html_table
from hooked_mllm.display.text import shortened


class Record(dict[str, Any]):
    """The settings of an intervention, and under "applied" the calls of hook points edited so far."""

    def _repr_html_(self) -> str:
        return html_block(str(self.get("intervention", type(self).__name__)), _table(self))


class Records(list[dict[str, Any]]):
    """The records of several interventions, in the order in which these were specified."""

    def _repr_html_(self) -> str:
        parts = [_table(record, (record.get("intervention", ""), "")) for record in self]
        return html_block(f"{len(self)} intervention{'' if len(self) == 1 else 's'}", *parts)


def _table(record: Mapping[str, Any], header: tuple[str, ...] = ()) -> str:
    """Name and value of each entry."""
    texts = {n: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False, default=repr) for n, v in record.items()}
    cells = [(name, shortened(text, 1000)) for name, text in texts.items() if name != "intervention"]
    return html_table(cells, header, named=True)
