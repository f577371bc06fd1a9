"""Names of heads, written and read back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooked_mllm.display.head_names import head_name, head_names, is_heads_text, parse_head, parse_names, shortened_repr
from hooked_mllm.errors import HeadError


@given(st.tuples(st.integers(0, 200), st.integers(0, 200)))
def test_a_name_is_read_back(head):
    assert head_name(*head) == f"L{head[0]}H{head[1]}"
    assert parse_head(head_name(*head)) == head
    assert parse_head(f" l{head[0]} h{head[1]} ") == head


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5), st.sampled_from([", ", ";", " ", "\n"]))
def test_a_list_of_names_is_read_back(heads, separator):
    text = separator.join(head_names(heads))
    assert parse_names(text) == heads
    assert is_heads_text(text) is bool(heads)


def test_other_text_is_not_heads():
    assert not is_heads_text("scores.json") and not is_heads_text("L2H4, best")
    for value in ("L2", "H4", "L2H", "2,4", "LxHy"):
        with pytest.raises(HeadError, match="Expected a head written like 'L20H15'"):
            parse_head(value)


def test_long_values_are_cut_in_errors():
    assert shortened_repr("L2H4") == "'L2H4'"
    assert shortened_repr("x" * 500) == "'" + "x" * 79 + "... (str)"
