"""What is printed: a table for people, or one JSON document for programs. Progress and errors go to stderr."""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from forged_fx.files import FileKind, make_room


class Interrupted(BaseException):
    """Ctrl-C, with what was kept and how to go on: no error, and nothing that handles errors handles it."""


def first() -> bool:
    """Whether this process prints and writes: of those that torchrun started, one does."""
    from forged_fx.processes import place  # late: it imports torch

    return place()[0] == 0


def show(document: Any, text: str, as_json: bool) -> None:
    """Print one of the two, in one process. A number that JSON does not have is an error."""
    if first():
        print(json.dumps(document, indent=1, allow_nan=False) if as_json else text.rstrip())


def note(text: str) -> None:
    """A line for whoever watches: on stderr, if that is a terminal."""
    if first() and sys.stderr.isatty():
        print(text, file=sys.stderr)


def _file(given: str) -> list[str]:
    return [given]


def _of_source(given: str) -> list[str]:
    """SOURCE:PATH, or a file: a name without a colon is the source's own, and no folder's that is called like it."""
    return [given.partition(":")[2] if ":" in given else given if os.path.isfile(given) else ""]


def _of_model(given: str) -> list[str]:
    """Likewise; what stands behind a colon is a path for `hf:` alone: timm:resnet18 may be evaluated in resnet18/."""
    return _of_source(given) if given.startswith("hf:") or ":" not in given else [""]


def _with_key(given: str) -> list[str]:
    return [given, given.rpartition(":")[0]]


# arguments that name what a command reads: the paths that may be meant; and those that name what it writes
READ: dict[str, Callable[[str], list[str]]] = {
    **dict.fromkeys(("model", "base"), _of_model),
    **dict.fromkeys(("data", "calibrate"), _of_source),
    **dict.fromkeys(("weights", "base_weights"), _with_key),
    **dict.fromkeys(("stats", "classes"), _file),
}
WRITTEN = ("out", "save", "folder")


def apart(arguments: Mapping[str, Any]) -> None:
    """typer.BadParameter if a command is to write over what it reads, whatever links lead there."""
    for written, (read, paths) in itertools.product(WRITTEN, READ.items()):
        target, source = (str(arguments.get(name) or "") for name in (written, read))
        for path in paths(source):
            if os.path.exists(path) and os.path.exists(target) and os.path.samefile(path, target):
                named = "MODEL" if read == "model" else f"--{read.replace('_', '-')}"
                raise typer.BadParameter(
                    f"--{written} {target} is what {named} {source} reads, and would be lost: choose another name"
                )


def check(kind_of: Callable[[Path], FileKind], *, run: Path | None, name: str, save: Path | None = None) -> None:
    """An error, ahead of all work, if one of these files cannot be written, or is there and of another kind.

    run: a run's folder, which has to be there; name: what the file in it is called. save: another file.
    """
    if run is not None and not run.is_dir():
        raise typer.BadParameter(f"--folder {run}: there is no such folder; evaluate --folder {run} makes one")
    for path in (run and run / name, save):
        if path is not None:
            kind_of(path).check(path)
            make_room(path)


def show_and_keep(rows: Any, as_json: bool, *paths: Path | None) -> None:
    """Print rows (see `forged_fx.rows`), and write them as each path's ending says: .json and .csv as text, others as a
    picture. Where one of the two fails, the other is done all the same."""
    try:
        show({"rows": rows.records(), **rows.more()}, str(rows), as_json)
    finally:
        for path in paths:
            if path is not None and first():
                rows.save(path) if path.suffix in (".json", ".csv") else rows.plot(path)


@contextlib.contextmanager
def resumable(where: Path | None) -> Iterator[None]:
    """Ctrl-C within says that the run's folder or file, if there is one, holds what was done."""
    try:
        yield
    except KeyboardInterrupt:
        if where is None or not where.exists():
            raise
        raise Interrupted(f"what was done is kept in {where}; the same command goes on from there") from None
