import pytest

from hooked_mllm.display.text import human_bytes, number_runs, shortened, text_table


def test_columns_are_as_wide_as_their_longest_cell():
    lines = text_table([("name", "n"), ("a longer name", 5), ("b", 1234)], align="<>").splitlines()
    assert lines == ["name              n", "a longer name     5", "b              1234"]


def test_least_widths_and_no_spaces_at_the_end():
    assert text_table([("a", "b", ""), ("c", "", "d")], least=(4,)).splitlines() == ["a     b", "c        d"]


def test_lines_of_other_lengths_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        text_table([("a", "b"), ("c",)])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (3 * 2**40, "3072.0 GiB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([4], "4"), ([3, 0, 2, 1, 5], "0-3, 5"), ((7, 9, 10), "7, 9-10")]
)
def test_number_runs(numbers, text):
    assert number_runs(numbers) == text


def test_shortened():
    assert shortened("  two\n words ") == "two words"
    assert shortened("what color is the star ?", 12) == "what color…", "no space before the ellipsis"
    assert shortened("abcdef", 6) == "abcdef" and shortened("abcdefg", 6) == "abcde…"
