"""The result as a table, and progress on a terminal."""

import shutil
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from forged_fx.checked import visible
from forged_fx.evaluate.result import Result, Row
from forged_fx.extras import need
from forged_fx.rows import Table, figures


def plain(text: str, style: str = "") -> Any:
    """Text that may come from a file, as it is: neither rich nor a terminal takes commands from it."""
    return need("rich.text").Text(visible(text), style)


def table(given: Table) -> Any:
    shown = need("rich.table").Table(title=given.title, title_justify="left")
    for heading, figure in zip(given.headings, figures(given.rows, len(given.headings)), strict=True):
        shown.add_column(heading, justify="right" if figure else "left", overflow="fold")
    for i, row in enumerate(given.rows):
        shown.add_row(*map(plain, row), style="bold" if i == given.bold else "")
    return shown


def share(part: float, n: int) -> str:
    return f"{100 * part:.2f} % ({round(part * n)})"


def _figures(result: Result) -> Any:
    table = need("rich.table").Table(title=f"right, of {result.n} inputs", title_justify="left")
    headings = ["", "model"]
    if result.base is not None:
        headings += ["base", "points", "95 % interval", "bootstrap", "McNemar p"]
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right")
    for name, kind in result.figures.items():
        cells = [name, *(share(side.accuracy(kind), result.n) for side in result.sides)]
        if p := result.compared(kind):
            intervals = ((p.low, p.high), (p.boot_low, p.boot_high))
            cells += [f"{100 * p.difference:+.2f}", *(f"{100 * low:+.2f} {100 * high:+.2f}" for low, high in intervals)]
            cells.append(f"{p.p:.2g}")
        table.add_row(*cells, style="bold" if kind == result.kinds[-1] else "")
    return table


def _rows(result: Result) -> Any:
    table = need("rich.table").Table(title="row by row", title_justify="left")
    for heading in ("side", "kind", "attack"):
        table.add_column(heading)
    for heading in ("attacked", "broken", "standing", "alone", "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("note", overflow="fold")
    for side in result.sides:
        for row in side.listed:
            counts = (row.attacked, row.broken, row.standing)
            alone = "" if row.alone is None else f"{round(row.alone * result.n)}"
            cells = (row.side, row.kind, row.attack, *map(str, counts), alone, f"{row.seconds:.1f}", row.note)
            table.add_row(*map(plain, cells))
        table.add_section()
    return table


def _findings(result: Result) -> Any:
    """What is raised, with its figures; the rest by name."""
    table = need("rich.table").Table(title="findings", title_justify="left")
    for heading in ("raised", "value", "bound", "a number of", "forbids a gain"):
        table.add_column(heading, justify="right" if heading in ("value", "bound") else "left")
    for f in result.findings:
        if f.raised:
            cells = (f.name, f"{f.value:.4g}", f"{f.bound:.4g}", f.unit, "yes" if f.masking else "no")
            table.add_row(*map(plain, cells))
    quiet = [f.name for f in result.findings if not f.raised and f.value is not None]
    idle = [f"{f.name}: {f.note}" for f in result.findings if f.value is None]
    lines = [f"not raised: {', '.join(quiet)}"] if quiet else []
    return need("rich.console").Group(*([table] if table.row_count else []), plain("\n".join(lines + idle)))


def _small_print(result: Result) -> Any:
    spent = sum(row.seconds for row in result.rows) + result.probe_seconds
    alone = sum(row.seconds for row in result.model.rows if row.kind == "true gradient")
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    lines = [
        f"{result.threat.norm} ball of radius {result.threat.eps:.6g}, seed {result.seed}, batch {result.batch_size}; "
        f"attacks: {', '.join(result.attacks)}",
        f"{spent:.1f} s"
        + (f", {spent / alone:.2f} x the model's true-gradient rows alone" if alone else "")
        + f"; of these {result.probe_seconds:.1f} s for findings",
        versions,
        *result.notes,
    ]
    return plain("\n".join(lines))


def render(result: Result) -> Any:
    """The whole result, to be printed by rich."""
    bold = plain(f"{result.verdict}: {result.sentence}", "bold")
    return need("rich.console").Group(bold, _figures(result), _findings(result), _rows(result), _small_print(result))


def text(printed: Any) -> str:
    """What rich would print, as plain text."""
    width = max(120, shutil.get_terminal_size((120, 50)).columns)
    console = need("rich.console").Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(printed, highlight=False)
    return str(capture.get())


class Progress:
    """Progress by row and by example on standard error; silent where that is no terminal, or if told so.

    log: is told, in a line, of each row that ended.
    """

    def __init__(self, shown: bool | None) -> None:
        self._bar: Any = None
        self._task: Any = None
        self.log: Callable[[str], object] = lambda line: None
        if sys.stderr.isatty() if shown is None else shown:
            rich, console = need("rich.progress"), need("rich.console").Console(stderr=True)
            columns = (
                rich.TextColumn("{task.description}"),
                rich.BarColumn(),
                rich.MofNCompleteColumn(),
                rich.TimeElapsedColumn(),
                rich.TimeRemainingColumn(),
            )
            # attacks slow down and speed up: the whole row's pace says more than the last half minute's
            self._bar = rich.Progress(*columns, console=console, transient=True, speed_estimate_period=3600)

    def begin(self, label: str, total: int, passes: int = 0) -> None:
        """passes: at most so many times will each input be fed to the model; 0: not known."""
        self._passes, self._done, self._part, self._total = passes, 0, 0.0, total
        if self._bar:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(label, total=total)

    def fed(self, inputs: int) -> None:
        """So many inputs went through the model: for an estimate before the first block ends."""
        if self._bar and self._passes:
            self._part += inputs / self._passes
            self._bar.update(self._task, completed=min(self._done + self._part, self._total))

    def advance(self, examples: int) -> None:
        self._done, self._part = self._done + examples, 0.0
        if self._bar:
            self._bar.update(self._task, completed=self._done)

    def end(self, row: Row) -> None:
        self.log(
            f"{row.side}: {row.kind}, {row.attack}: {row.attacked} attacked, {row.broken} broken, {row.standing} "
            f"standing, {row.seconds:.1f} s" + (f" ({row.note})" if row.note else "")
        )

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
