"""Files that appear whole or not at all, and over none of another kind."""

import glob
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileKind:
    """What a file holds, in words, and bytes that stand in every such file and in no other: they tell whether a file
    that is there already may be written over."""

    what: str
    marks: tuple[bytes, ...]

    def check(self, path: Path) -> None:
        """FileExistsError if a file of another kind is there. An empty one is of any kind; and of a link only the link
        would be lost. IsADirectoryError for a folder."""
        no_folder(path)
        if path.exists() and not path.is_file():
            raise FileExistsError(f"{path} is no file but a device or the like, and would be replaced: name a file")
        there = path.is_file() and not path.is_symlink() and path.stat().st_size
        if there and not any(_holds(path, mark) for mark in self.marks):
            raise FileExistsError(
                f"{path} is there already, and is no {self.what}, for which this name was given: choose another name, "
                "or move that file away"
            )


def no_folder(path: Path) -> None:
    """IsADirectoryError if a folder is there, or the path is empty, which is the folder that the program runs in."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")


def _holds(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(mark) >= 0


# the keys of the headers of safetensors files
STATS_KEY, FORGED_KEY, DEMO_KEY = "forged_fx.stats", "forged_fx.forged", "forged_fx.demo"

STATISTICS = FileKind("file of calibration statistics", (f'"{STATS_KEY}":'.encode(),))
# (an older version's have no key, but the thresholds' names)
WEIGHTS = FileKind(
    "file of a forged model's weights",
    (f'"{FORGED_KEY}":'.encode(), b"forged_threshold", b"forged_limit", b"forged_width"),
)
PROGRAM = FileKind("program of a forged model", (b"torch.ops.forged_fx.", FORGED_KEY.encode()))
DEMO = FileKind("file of the demo's weights", (f'"{DEMO_KEY}":'.encode(),))
FIGURES = FileKind("file of forged_fx's figures", (b'"forging": ',))
# (an older version's have no generator, but the one policy)
PAGE = FileKind(
    "report of forged_fx",
    (b'<meta name="generator" content="forged_fx">', b"img-src data:; script-src 'sha256-"),
)
PICTURE = FileKind("picture that Matplotlib drew", (b"atplotlib",))
PICTURES = (".svg", ".png", ".pdf")  # the formats in which Matplotlib says that it drew them


def ends_with(path: Path, *suffixes: str) -> None:
    """ValueError if the path has another suffix."""
    if path.suffix not in suffixes:
        raise ValueError(f"{path}: the name has to end with {', '.join(suffixes[:-1])} or {suffixes[-1]}")


def table(columns: Iterable[str]) -> FileKind:
    """A CSV file of these columns."""
    return FileKind("table of these figures", (",".join(columns).encode(),))


@contextmanager
def whole(path: Path, kind: FileKind | None = None) -> Iterator[Path]:
    """A temporary path to write to. When the block ends it takes the name `path`, with its content on the disk.

    A reader, or whoever comes after a crash, finds the old file or the new one, never a part. kind: the path may be
    anywhere, and a file there of another kind stays, with a FileExistsError; None: it is in a folder of our own.
    """
    if kind is not None:
        kind.check(path)
    part = _part(path)
    with _said(path):
        part.unlink(missing_ok=True)  # in a folder of someone else's it may be a link to anywhere
    _sweep(path)
    try:
        make_beside(part, path)  # a folder that cannot be written to says so now
        mode = part.stat().st_mode
        yield part
        os.chmod(part, mode)  # (safetensors makes files that no one else can read)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        error.add_note(f"{path} was not written; what stood there before stands")
        raise
    finally:
        part.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # where a folder is a file with the names in it, these too have to reach the disk
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_beside(beside: Path, path: Path) -> None:
    """Make an empty file beside the path; an OSError that says why not, and what to do."""
    with _said(path):
        beside.touch()


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def make_room(path: Path) -> None:
    """Make the folder that a file is to be in; an OSError, ahead of all work, where no file can be made there."""
    with _said(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent), suppress(FileNotFoundError):
            os.lstat(_part(path))  # a name may be too long


@contextmanager
def _said(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        raise type(error)(
            f"no file can be made in {path.parent} ({error.strerror}): make that folder, or put {path.name} into one "
            "that can be written to"
        ) from error


def _sweep(path: Path) -> None:
    """Remove what processes have left that were killed while they wrote this file."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        pid = part.name.split(".")[-2]
        if os.name == "posix" and pid.isascii() and pid.isdigit() and not _runs(int(pid)):
            part.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # asks only
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
