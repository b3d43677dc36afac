"""What the benchmarks print: lines of Markdown, as soon as they are measured. Imports no torch."""

from pathlib import Path

from vit.files import write_text
from vit.text import markdown_table


class Report:
    """The lines of a benchmark, printed and, where `out` is given, kept in that file."""

    def __init__(self, out: Path | None):
        self.out = out
        self.lines: list[str] = []

    def add(self, *lines: str) -> None:
        """Print lines and write all lines so far."""
        print("\n".join(lines), flush=True)
        self.lines += lines
        # Each time, so that an interrupted benchmark leaves what it has measured
        if self.out is not None:
            write_text(self.out, "\n".join(self.lines) + "\n")


def table_header(*columns: str) -> str:
    """Format the first two lines of a table whose rows follow as they are measured."""
    return markdown_table([columns])


def table_row(*cells: str) -> str:
    """Format one row; unlike in vit.text.markdown_table, the later rows are not known yet."""
    return f"| {' | '.join(cells)} |"
