"""Results that print as a table, are saved as JSON or CSV, and drawn."""

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from forged_fx import checked
from forged_fx.files import FIGURES, PICTURE, PICTURES, FileKind, ends_with, table, whole


@dataclass(frozen=True)
class Table:
    """Rows of text, to be printed or put on a page. bold: which row to look at."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    bold: int | None = None


def figures(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
    """Which columns hold figures, to be set flush right. The first never does: it names the row."""
    return [i > 0 and all(not row[i] or row[i][0] in "+-0123456789" for row in rows) for i in range(columns)]


Row = TypeVar("Row")  # a dataclass of numbers and text


class Rows(list[Row], Generic[Row]):
    """A list of rows of one dataclass, whose fields are the columns of a CSV file.

    forging: of which forging the figures are, see `fingerprint.of_forging`; None: not said.
    """

    row: ClassVar[type]
    forging: str | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows, whole or not at all, as the path's suffix says: .json or .csv; ValueError for others.

        FileExistsError if a file is there that is no such one.
        """
        checked.path(path, f"{type(self).__name__}.save")
        path = Path(path)
        ends_with(path, ".json", ".csv")
        if path.suffix == ".csv":
            self.file(path).check(path)
            write_csv(path, self._columns(), self.records())
            return
        with whole(path, self.file(path)) as part:
            text = json.dumps({"rows": self.records(), **self.more()}, indent=1, allow_nan=False)
            part.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def _columns(cls) -> list[str]:
        return [field.name for field in fields(cls.row)]

    @classmethod
    def file(cls, path: Path) -> FileKind:
        """What kind of file the rows become under that name: saved, or drawn. ValueError for another suffix."""
        kinds = {".json": FIGURES, ".csv": table(cls._columns()), **dict.fromkeys(PICTURES, PICTURE)}
        ends_with(path, *kinds)
        return kinds[path.suffix]

    def records(self) -> list[dict[str, Any]]:
        """As a file has them: a number that JSON does not have is text, "inf" or "nan"."""

        def plain(value: Any) -> Any:
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        return [{key: plain(value) for key, value in asdict(row).items()} for row in self]

    def more(self) -> dict[str, Any]:
        """What a JSON file holds besides the rows."""
        return {"forging": self.forging}


def write_csv(path: Path, columns: Sequence[str], records: Iterable[dict[str, Any]]) -> None:
    """A CSV file, whole or not at all."""
    with whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def text(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as text: what begins with a letter is set to the left, numbers to the right."""
    lines = [[checked.visible(cell) for cell in line] for line in (headings, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    left = [all(line[i][:1].isalpha() or not line[i] for line in lines[1:]) or i == 0 for i in range(len(headings))]
    shown = [
        "  ".join(
            c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([shown[0], "-" * max(map(len, shown)), *shown[1:]])


def share(value: float | None) -> str:
    """A share as text; nothing where it is not known."""
    return "" if value is None else f"{100 * value:.1f} %"
