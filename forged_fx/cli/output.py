"""What is printed: a table for people, or one JSON document for programs. Progress and errors go to stderr."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any


class Interrupted(BaseException):
    """Ctrl-C, with what was kept and how to go on: no error, and nothing that handles errors handles it."""


def first() -> bool:
    """Whether this process prints and writes: of those that torchrun started, one does."""
    return int(os.environ.get("RANK", 0)) == 0


def show(document: Any, text: str, as_json: bool) -> None:
    """Print one of the two, in one process. A number that JSON does not have is an error."""
    if first():
        print(json.dumps(document, indent=1, allow_nan=False) if as_json else text.rstrip())


def note(text: str) -> None:
    """A line for whoever watches: on stderr, if that is a terminal."""
    if first() and sys.stderr.isatty():
        print(text, file=sys.stderr)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns of text; a column is flush right where every cell is a number."""
    lines = [[str(cell) for cell in row] for row in rows]
    numbers = [all(not line[i] or line[i][0] in "+-0123456789" for line in lines) for i in range(len(headings))]
    widths = [max(len(line[i]) for line in [list(headings), *lines]) for i in range(len(headings))]

    def joined(cells: Sequence[str]) -> str:
        set_ = (
            cell.rjust(width) if figure else cell.ljust(width)
            for cell, width, figure in zip(cells, widths, numbers, strict=True)
        )
        return "  ".join(set_).rstrip()

    return "\n".join([joined(headings), "-" * (sum(widths) + 2 * len(widths) - 2), *map(joined, lines)])
