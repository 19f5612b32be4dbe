"""The processes that share a piece of work: those that torchrun started, or this one alone.

They exchange bytes, on the CPU, over gloo: whatever the models run on, and whatever backend the caller's own process
group has. A slow one is waited for, and it is said for which; one that has ended is an error.
"""

import builtins
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from forged_fx import torch_internals

PATIENCE = timedelta(minutes=10)  # for the others to make the same call
FOREVER = timedelta(days=30)  # for the others to finish a block: attacks on large models take long
WORD = timedelta(minutes=1)  # between two words of whoever waits


class Barrier:
    """Where all processes meet, again and again: the store counts how often each has come.

    call: what they do together, for messages.
    """

    def __init__(self, store: Any, rank: int, size: int, call: str) -> None:
        self.store, self.rank, self.size, self.call = store, rank, size, call

    @contextmanager
    def waiting(self, what: str = "") -> Iterator[int]:
        """This one has come once more, and waits for the others; yields how often it has come.

        One process of those that wait says for whom, again and again, on standard error: so a slow one can be told from
        one that will never come. what: they meet for, in words.
        """
        number, over = self.store.add(str(self.rank), 1), threading.Event()
        self.store.add("all", 1)
        at = f"{self.call}, {what}" if what else self.call

        def tell() -> None:
            with suppress(RuntimeError):  # the store is gone; whoever waits learns it by itself
                for times in count(1):
                    if over.wait(WORD.total_seconds()):
                        return
                    late = self.late(number)
                    if late and min(set(range(self.size)) - set(late)) == self.rank:
                        waited = _lasting(times * WORD)
                        print(f"{at}: process {self.rank} has waited {waited} for {_named(late)}", file=sys.stderr)

        threading.Thread(target=tell, daemon=True).start()
        try:
            yield number
        finally:
            over.set()

    def late(self, number: int) -> list[int]:
        """Those that have not come so often."""
        return [rank for rank in range(self.size) if self.store.add(str(rank), 0) < number]

    def wait(self) -> int:
        """Wait for all, and return how often they have met. RuntimeError names those that do not come in time."""
        began = time.monotonic()
        with self.waiting() as number:
            while self.store.add("all", 0) < self.size * number:
                if time.monotonic() - began > PATIENCE.total_seconds():
                    late = _named(self.late(number))
                    for key in (str(self.rank), "all"):
                        self.store.add(key, -1)
                    raise RuntimeError(
                        f"{self.call} is shared by the {self.size} processes of this group, and all must make the same "
                        f"call: {late} did not within {_lasting(PATIENCE)}; shard=False keeps it to one process"
                    )
                time.sleep(0.05)
        return number


def _named(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _lasting(time: timedelta) -> str:
    seconds = time.total_seconds()
    return f"{seconds / 60:g} minutes" if seconds >= 120 else f"{seconds:g} s"


class Processes:
    """One of `size` processes. Every method must be called by all of them, in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, barrier: Barrier | None = None) -> None:
        self.rank, self.size, self._group, self._barrier = rank, size, group, barrier

    def gather(self, data: bytes, what: str = "") -> list[bytes]:
        """What each process passed, by rank; the same list everywhere. what: that is, for whoever waits."""
        if self.size == 1:
            return [data]
        with self._exchange(what):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(data)]), group=self._group)
            longest = max(map(int, lengths))
            if not longest:
                return [b""] * self.size
            everyone = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(everyone, _tensor(data.ljust(longest, b"\0")), group=self._group)
        return [part[: int(length)].numpy().tobytes() for part, length in zip(everyone, lengths, strict=True)]

    def first(self, act: Callable[[], bytes | None]) -> bytes:
        """What `act` returns in process 0, which alone runs it; an error of its is raised in every process."""
        if self.size == 1:
            return act() or b""
        error, data = attempt(act) if self.rank == 0 else (None, b"")
        length = torch.tensor([len(data)])
        with self._exchange():
            dist.broadcast(length, 0, group=self._group)
            buffer = _tensor(data) if self.rank == 0 else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(buffer, 0, group=self._group)
        if error:
            raise error
        return result(buffer.numpy().tobytes(), "process 0")

    @contextmanager
    def _exchange(self, what: str = "") -> Iterator[None]:
        """An exchange that fails says why: the others are gone."""
        try:
            with self._barrier.waiting(what):
                yield
        except RuntimeError as error:
            raise ConnectionError(
                f"another process of this call of {self._barrier.call} has ended or cannot be reached: its own error, "
                "if any, says why"
            ) from error


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def attempt(act: Callable[[], bytes | None]) -> tuple[Exception | None, bytes]:
    """Run `act`: (the error that it raised, or None; bytes from which `result`, in another process, returns what `act`
    returned or raises such an error)."""
    try:
        return None, b"+" + (act() or b"")
    except Exception as error:
        return error, b"-" + json.dumps([type(error).__name__, str(error)]).encode()


def result(answer: bytes, who: str) -> bytes:
    """What the other process's `attempt` returned; or its error, of the same built-in type if it was of one."""
    if answer[:1] == b"+":
        return answer[1:]
    name, text = json.loads(answer[1:])
    kind, error = getattr(builtins, name, None), None
    if isinstance(kind, type) and issubclass(kind, Exception):
        with suppress(TypeError):  # some are made of more than a text
            error = kind(f"{who}: {text}")
    raise error or RuntimeError(f"{who}: {name}: {text}")


def place() -> tuple[int, int]:
    """(rank of this process, number of them) among those that torchrun started, (0, 1) where it started none.

    RANK alone, without WORLD_SIZE, says nothing.
    """
    found = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    return (0, 1) if None in found else (int(found[0]), int(found[1]))


@functools.cache
def _torchruns() -> tuple[Any, int, int]:
    """The store of torchrun's processes, this one's rank, and how many there are."""
    return next(iter(dist.rendezvous("env://", timeout=PATIENCE)))


@contextmanager
def joined(shard: bool | None, call: str) -> Iterator[Processes]:
    """All processes of the caller's process group or of torchrun's; this one alone if there is but one, or not `shard`.

    RuntimeError if the others do not make the same call within ten minutes.
    """
    if not (shard is None or isinstance(shard, bool)):
        raise TypeError(f"shard={shard!r}: True, False, or None for all processes that there are")
    initialised = dist.is_available() and dist.is_initialized()
    size = dist.get_world_size() if initialised else place()[1]
    if shard is False or size == 1:
        yield Processes()
        return
    if initialised:
        store, rank = torch_internals.store_of_processes(), dist.get_rank()
    else:
        try:
            store, rank, size = _torchruns()
        except RuntimeError as error:
            raise RuntimeError(
                f"{call} is shared by the {size} processes that WORLD_SIZE says there are, and they do not find each "
                f"other ({error}): start all of them, or pass shard=False"
            ) from error
    # A group waits for all of its processes as long as it lives, so they meet before there is one.
    number = Barrier(dist.PrefixStore("forged_fx", store), rank, size, call).wait()
    # The store outlives groups, and has the addresses of each that this program has made. Ours keep theirs under a
    # name for each call: they find no other's, and no later group of the caller's finds ours.
    own = dist.PrefixStore(f"forged_fx {number}", store)
    if not initialised:
        dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=FOREVER)
    try:
        yield Processes(rank, size, dist.new_group(backend="gloo", timeout=FOREVER), Barrier(own, rank, size, call))
    finally:
        if not initialised:
            dist.destroy_process_group()
