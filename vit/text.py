"""Text for people: durations, shortened names, columns, tables."""

import unicodedata
from collections.abc import Sequence


def format_duration(seconds: float) -> str:
    """Format seconds as 3:05 (minutes and seconds), 2:03:05 (with hours) or 1 day 2:03:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if not hours and not days:
        return f"{minutes}:{rest:02}"
    clock = f"{hours}:{minutes:02}:{rest:02}"
    if not days:
        return clock
    return f"{days} day{'s' if days > 1 else ''} {clock}"


def format_bytes(size: float) -> str:
    """Format bytes as 12 KiB, 3.4 MiB or 5.67 GiB."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    if size >= 2**20:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**10:.0f} KiB"


def shorten(text: str, length: int) -> str:
    """Cut a text to at most `length` characters, the last of which is then an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, for errors that must fit on one line."""
    return str(error).strip().split("\n")[0]


def escape_unprintable(text: str) -> str:
    """Replace what a terminal would obey or can't show, such as line breaks, by its escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def pad(text: str, width: int) -> str:
    """Pad a text with spaces to so many columns of a terminal; a wider one stays as it is."""
    return text + " " * (width - display_width(text))


def display_width(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(map(char_width, text))


def char_width(char: str) -> int:
    """How many columns of a terminal a character takes: 0, 1 or 2."""
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table with padded columns, so that it also reads well on a terminal.

    rows: the first is the header; all have the same number of cells.
    """
    # A bar or a line break would end the cell: class names and messages may hold either
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]

    lines = []
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
