"""How msd speaks to a person: plain tables, colours only on a terminal that wants them, errors on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Final, TextIO

DASH: Final = "-"
"""Stands where nothing was measured; never 0."""

_CODES: Final = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


def redraws(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether lines on `stream` can be redrawn in place."""
    return stream.isatty() and environ.get("TERM") != "dumb"


def colours(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `stream` is a terminal that shows colours, and nobody asked for none (https://no-color.org)."""
    return redraws(stream, environ) and not environ.get("NO_COLOR")


def paint(text: str, *styles: str, stream: TextIO | None = None) -> str:
    """`text` in the given styles (bold, dim, red, green, yellow), where `stream` (stdout) shows them."""
    if not text or not styles or not colours(stream or sys.stdout):
        return text
    return f"\x1b[{';'.join(_CODES[style] for style in styles)}m{text}\x1b[0m"


def complain(message: str) -> None:
    """Say on stderr what went wrong, each line with the program's name in front."""
    prefix = paint("msd:", "bold", "red", stream=sys.stderr)
    for line in message.splitlines() or [""]:
        print(prefix, line, file=sys.stderr)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Lines of a table: the columns in `left` to the left, all others to the right; widths fit the content."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [paint(line(head), "bold"), *map(line, rows)]


def number(value: object, unit: str = "", digits: int = 1) -> str:
    """A figure with its unit, or a dash where there is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return DASH
    text = f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"
    return f"{text} {unit}" if unit else text
