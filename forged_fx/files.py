"""Files that appear whole or not at all."""

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to. When the block ends it takes the name `path`, with its content on the disk.

    A reader, or whoever comes after a crash, finds the old file or the new one, never a part.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)  # in a folder of someone else's it may be a link to anywhere
    _sweep(path)
    try:
        part.touch()  # a folder that cannot be written to says so now, and with its name
        yield part
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
