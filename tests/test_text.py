"""Text for people: durations, shortened names, tables."""

import pytest

from vit.text import (
    display_width,
    escape_unprintable,
    first_line,
    format_duration,
    markdown_table,
    pad,
    shorten,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (5.4, "0:05"),
        (59.6, "1:00"),
        (185, "3:05"),
        (3600, "1:00:00"),
        (7385, "2:03:05"),
        (86400, "1 day 0:00:00"),
        (2 * 86400 + 7385, "2 days 2:03:05"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "shortened"), [("", ""), ("cat", "cat"), ("tiger", "tiger"), ("leopard", "leop…")]
)
def test_texts_are_cut_to_their_length(text, shortened):
    assert shorten(text, 5) == shortened


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(ValueError()) == ""


def test_tables_have_columns_of_one_width_and_cells_that_stay_whole():
    rows = [["name", "top-1"], ["a|b\nc", "1 %"], ["", "100 %"]]
    assert markdown_table(rows).splitlines() == [
        "| name   | top-1 |",
        "|--------|-------|",
        "| a\\|b c | 1 %   |",
        "|        | 100 % |",
    ]


def test_text_on_a_terminal_is_safe_and_as_wide_as_it_looks():
    assert escape_unprintable("a\x1b[2J\nü鳥") == r"a\x1b[2J\nü鳥"
    assert display_width("ab") == 2
    assert display_width("鳥") == 2
    assert display_width("u\u0308") == 1  # a letter and a combining mark
    assert pad("鳥", 3) == "鳥 "
