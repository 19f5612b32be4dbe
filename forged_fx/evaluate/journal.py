"""An unfinished run in the folder that its result will be in. Killed at any moment, the same call goes on from here.

unfinished/call.json              what was asked
unfinished/<work>.<block>.safetensors    what each finished block found
unfinished/lock                   held while a process works on the run; the system frees it when the process ends
log.txt                           what happened when; it stays
"""

import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import filelock  # torch needs it too
import torch
from torch import Tensor, nn

from forged_fx import checked
from forged_fx.evaluate import fingerprint
from forged_fx.extras import need
from forged_fx.files import whole
from forged_fx.processes import Processes

UNFINISHED, CALL, LOG = "unfinished", "call.json", "log.txt"
MOST = 2**33  # bytes of a block's file
STAMP = "%Y-%m-%d %H:%M:%SZ"

Found = TypeVar("Found")
Call = dict[str, Any]  # what was asked, as JSON has it: two runs of equal calls have equal results


class Journal:
    """Blocks of the run that `call` makes in `folder`: those of an earlier attempt, and those that are added.

    FileExistsError if an unfinished run of another call is there. BlockingIOError if another process works on it.
    """

    def __init__(self, folder: str | os.PathLike[str], call: Call) -> None:
        self.folder = Path(folder) / UNFINISHED
        if Path(folder).exists() and not Path(folder).is_dir():
            raise FileExistsError(f"{folder} is a file, and a run is kept in a folder: choose another name")
        if self.folder.is_symlink():
            raise FileExistsError(f"{self.folder} is a link, and what is in it would be deleted: take it away")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._no_others()
        self._lock = filelock.FileLock(self.folder / "lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise BlockingIOError(f"another process works on {folder}; wait for it, or choose another folder") from None
        try:
            self.resumed = self._open(call)
        except BaseException:
            self._lock.release()
            raise

    def _no_others(self) -> None:
        """FileExistsError if the folder holds files of someone else's: at the end it is deleted with all in it."""
        ours = re.compile(r"lock|call\.json|\.call\.json\.\d+\.part|.*\.safetensors")
        names = [path.name for path in self.folder.iterdir()]
        if CALL not in names and (others := [name for name in names if not ours.fullmatch(name)]):
            found = checked.short(others[0])
            raise FileExistsError(f"{self.folder} is no run's, it holds {found}: choose another folder")

    def _open(self, call: Call) -> int:
        for part in self.folder.glob(".*.part"):  # of a process that was killed while it wrote
            part.unlink()
        log = self.folder.parent / LOG
        lines = checked.read(log).decode(errors="replace").splitlines() if log.exists() else []
        self._said = {line.partition("  ")[2] for line in lines}
        asked, blocks = self.folder / CALL, len(list(self.folder.glob("*.safetensors")))
        if blocks:
            check(self._asked(), call, self.folder.parent)
        else:
            with whole(asked) as path:
                path.write_text(json.dumps(call, indent=1) + "\n", encoding="utf-8")
        return blocks

    def _asked(self) -> Call:
        path = self.folder / CALL
        try:
            asked = checked.fit(checked.parse(checked.read(path)), dict[str, Any], "the call")
            checked.fit(asked.get("command"), list[str], "command")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} does not say what was asked ({error}); choose another folder") from error
        return asked

    @property
    def command(self) -> list[str]:
        """How the run was first started."""
        return self._asked()["command"]

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.{number:04d}.safetensors"

    def keep(self, name: str, number: int, data: bytes) -> None:
        with whole(self._path(name, number)) as path:
            path.write_bytes(data)

    def recall(self, name: str, count: int) -> dict[int, bytes]:
        """Of the blocks 0 ... count - 1 of this work those that are finished. A damaged file counts as none."""
        found = {}
        for number in range(count):
            path = self._path(name, number)
            if not path.exists():
                continue
            try:
                found[number] = intact(checked.read(path, MOST))
            except ValueError as error:
                self.log(f"{path.name} is damaged, and its block done anew: {error}")
        return found

    def log(self, text: str) -> None:
        with open(self.folder.parent / LOG, "a", encoding="utf-8", opener=_no_link) as file:
            file.write(f"{datetime.now(UTC):{STAMP}}  {text}\n")

    def log_once(self, text: str) -> None:
        """Not again, if an earlier attempt has said it."""
        if text not in self._said:
            self.log(text)

    def finish(self) -> None:
        """The result is written: the blocks have served. Killed here, the folder says to the last whose it is."""
        for path in self.folder.iterdir():
            if path.name != CALL:
                with suppress(OSError):
                    path.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "Journal":
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._terminate)  # what a scheduler sends, and torchrun
        return self

    def _terminate(self, *_: Any) -> None:
        raise SystemExit(
            f"stopped by SIGTERM; what is done is kept in {self.folder.parent}: the same call goes on from there"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # torchrun ends the others of a job that failed: the word of what is kept must not be lost to that.
        ends = kind is not None and "TORCHELASTIC_RUN_ID" in os.environ
        if signal.getsignal(signal.SIGTERM) == self._terminate and not ends:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            if kind:
                error.add_note(f"what is done is kept in {self.folder.parent}: the same call goes on from there")
                with suppress(OSError):  # a full disk may be what stopped it
                    what = f"{kind.__name__}: {error}".removesuffix(": ")
                    self.log(f"stopped by {what}; the same call goes on from here")
        finally:
            self._lock.release()


def begin(
    folder: str | os.PathLike[str],
    asked: Call,
    processes: Processes,
    record: str,
    parse: Callable[[dict[str, bytes], str], Found],
    *,
    writes: Iterable[str],
    read: Callable[[Path], dict[str, bytes]] | None = None,
    call_of: Callable[[Any], Call] = lambda found: found.facts["call"],
) -> tuple[Journal | None, Found | None]:
    """The journal to work with, in process 0; or the result, in every process, if the folder holds it already.

    record: the file that only a folder with a result has. parse: the result that files hold, name -> content, in the
    folder of this name. writes: what files a run ends with besides. read: those that make up the result, by default the
    record alone. call_of: what was asked of a result. FileExistsError if the folder holds the run of another call, or
    someone else's file under one of these names.
    """
    folder, journal = Path(folder), None

    def open_folder() -> bytes:
        nonlocal journal
        if not (folder / record).exists():
            unwritten(folder, writes)
            journal = Journal(folder, asked)
            return b""
        files = read(folder) if read else {record: checked.read(folder / record)}
        check(call_of(parse(files, str(folder))), asked, folder)
        if (folder / UNFINISHED).exists():  # killed when all was written; else it is another call's, and stays
            with suppress(OSError, ValueError), Journal(folder, asked) as rest:
                rest.finish()
        return need("safetensors.torch").save(
            {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files.items()}
        )

    packed = processes.first(open_folder)
    if not packed:
        return journal, None
    files = need("safetensors.torch").load(packed)
    return None, parse({name: data.numpy().tobytes() for name, data in files.items()}, str(folder))


def unwritten(folder: Path, names: Iterable[str]) -> None:
    """FileExistsError if a file of these names is in the folder, and no unfinished run that could have written it."""
    there = [name for name in names if (folder / name).exists() or (folder / name).is_symlink()]
    if there and not (folder / UNFINISHED).exists():
        raise FileExistsError(
            f"{folder} holds {there[0]} of something else, which would be written over: choose another folder, or move "
            "it away"
        )


def pack(tensors: dict[str, Tensor]) -> bytes:
    """As safetensors, with a sum by which `intact` knows a damaged file."""
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    return need("safetensors.torch").save(tensors, {"sha256": fingerprint.of_tensors(sorted(tensors.items()))})


def intact(data: bytes) -> bytes:
    """The same bytes; ValueError unless `pack` wrote them."""
    try:
        tensors = need("safetensors.torch").load(data)
        header = checked.parse(data[8 : 8 + int.from_bytes(data[:8], "little")])
        same = header["__metadata__"]["sha256"] == fingerprint.of_tensors(sorted(tensors.items()))
    except (need("safetensors").SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    if not same:
        raise ValueError("its content is not what was written")
    return data


def _no_link(path: str, flags: int) -> int:
    """How to open a file that may have been put there by anyone: not where a link leads."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def check(there: Call, here: Call, folder: Path) -> None:
    """FileExistsError, with every difference, unless both calls ask for the same."""
    different = list(differences(there, here))
    if different:
        raise FileExistsError(
            f"{folder} holds a run of another call; choose another folder. "
            + "; ".join(f"{checked.visible(name)[:80]}: {old} there, {new} here" for name, old, new in different)
        )


def agree(processes: Processes, call: Call, models: Mapping[str, nn.Module], **more: Any) -> None:
    """ValueError, with every difference, unless all processes make the same call, of the same models. more: what it has
    besides."""
    if processes.size == 1:
        return
    for name, model in models.items():
        more |= {f"{part} of {name}": value for part, value in fingerprint.of_parts(model).items()}
    calls = [json.loads(data) for data in processes.gather(json.dumps(call | more).encode())]
    different = {
        (name, f"{name} is {mine} in process {rank}, {first} in process 0")
        for rank, one in enumerate(calls)
        for name, first, mine in differences(calls[0], one)
    }
    if not different:
        return
    parts = {name.partition(" of ")[0] for name, _ in different if name in more}
    raise ValueError(
        f"the processes that share a run make different calls: {'; '.join(sorted(said for _, said in different))} "
        + (_OWN_BUFFERS if parts == {"buffers"} else "")
        + "(shard=False keeps each to itself)"
    )


_OWN_BUFFERS = (
    "(training leaves each process running statistics of its own: for buffer in model.buffers(): "
    "torch.distributed.broadcast(buffer, 0) gives all those of process 0) "
)


def differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(field, there, here) for each field that counts; `IGNORED` ones do not."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys((*there, *here)):
            inner = f"{name}.{key}" if name else key
            if inner not in IGNORED:
                yield from differences(there.get(key), here.get(key), inner)
        if list(there) != list(here) and there.keys() == here.keys():  # what is done first is another
            yield f"the order of {name or 'arguments'}", _short(", ".join(there)), _short(", ".join(here))
    elif json.dumps(there) != json.dumps(here):
        yield name, _short(there), _short(here)


IGNORED = ("command", "versions.python")


def _short(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:12]}..."
    return "none" if value is None else checked.visible(str(value))[:200]
