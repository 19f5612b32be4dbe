"""A scan that may be killed: its statistics so far in a file, from which the same call goes on.

The file is one of `Stats`, and says besides what is being scanned: the model by its weights, and the batches so far by
a sum, so that other ones are noticed: over all of them, or, where the rest can be had without making those, over the
last.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import filelock  # torch needs it too
import torch

from forged_fx import checked
from forged_fx.calibrate import model_inputs, scan
from forged_fx.evaluate import fingerprint
from forged_fx.files import STATS_KEY, make_beside, no_folder
from forged_fx.progress import track
from forged_fx.stats import Stats
from forged_fx.torch_internals import tree_leaves

SECONDS = 60.0  # between two copies on the disk


def resumed(
    model: torch.nn.Module,
    batches: Iterable[Any],
    path: Path,
    *,
    where: str,
    channels: bool,
    max_batches: int | None = None,
) -> Stats:
    """The statistics of all batches, those that an earlier call has scanned among them; exactly as `scan` has them.

    Batch by batch, and merged, so that what is kept is always the statistics of whole batches. BlockingIOError if
    another process works on the file.
    """
    source: Replayed | Indexed
    if isinstance(batches, Sequence) and not isinstance(batches, list | tuple):
        source = Indexed(model, batches, max_batches)
    else:
        source = Replayed(model, batches, max_batches)
    no_folder(path)
    with contextlib.suppress(OSError):  # the next line says it better
        path.parent.mkdir(parents=True, exist_ok=True)
    make_beside(_lock(path), path)  # where none can be made, filelock says no more than that it was not got
    lock = filelock.FileLock(_lock(path))
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(f"another process works on {path}; wait for it, or choose another file") from None
    with held:
        return _resumed(model, source, path, where, channels)


def forget(path: Path) -> None:
    """Remove a checkpoint that has served."""
    for file in (path, _lock(path)):
        file.unlink(missing_ok=True)


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


class Replayed:
    """Batches that are gone through from the beginning, and known by a sum over all so far."""

    def __init__(self, model: torch.nn.Module, batches: Iterable[Any], most: int | None) -> None:
        self._model, self._batches = model, iter(track(batches, "calibrating", most))
        self._sums, self._digests = hashlib.sha256(), [""]
        self.example: Any = None  # the first, as the model takes it

    def skip(self, count: int) -> int:
        """Go past so many; returns how many there were."""
        return sum(1 for _ in islice(self, count))

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            inputs = model_inputs(batch, self._model)
            self._sums.update(_sum(inputs).encode())  # now: a model may write into what it is given
            self._digests.append(self._sums.hexdigest())
            self.example = self.example or inputs
            yield batch

    def sum(self, count: int) -> str:
        """By which the first `count` of those that were given out are known."""
        return self._digests[count]


class Indexed:
    """A sequence of batches that are made when they are asked for: the rest is, and those before it are known by the
    last of them."""

    def __init__(self, model: torch.nn.Module, batches: Sequence[Any], most: int | None) -> None:
        self._model, self._batches, self._done = model, batches[:most], 0

    @property
    def example(self) -> Any:
        return model_inputs(self._batches[0], self._model)

    def skip(self, count: int) -> int:
        self._done = min(count, len(self._batches))
        return self._done

    def __iter__(self) -> Iterator[Any]:
        return iter(track(self._batches[self._done :], "calibrating"))

    def sum(self, count: int) -> str:
        """By which the first `count` are known."""
        return _sum(model_inputs(self._batches[count - 1], self._model))


def _sum(inputs: Any) -> str:
    return fingerprint.of_tensors((str(i), leaf) for i, leaf in enumerate(tree_leaves(inputs)))


def _resumed(model: torch.nn.Module, source: Replayed | Indexed, path: Path, where: str, channels: bool) -> Stats:
    asked = {
        "model": fingerprint.of_model(model),
        "architecture": fingerprint.of_architecture(model),
        "where": where,
        "channels": channels,
    }
    stats, there = _read(path)
    different = [key for key, value in asked.items() if there.get(key, value) != value]
    if different:
        raise FileExistsError(
            f"{path} is a scan with another {', '.join(different)}: choose another file, or delete it"
        )
    saved, kept = time.monotonic(), stats.batches

    def keep() -> None:
        nonlocal saved, kept
        stats.write(path, checkpoint=asked | {"batches": source.sum(stats.batches)})
        saved, kept = time.monotonic(), stats.batches

    try:
        if (found := source.skip(kept)) < kept:
            raise FileExistsError(f"{path} is a scan of {kept} batches, and there are {found}: delete it")
        if kept and source.sum(kept) != there["batches"]:
            raise FileExistsError(
                f"{path} is a scan of other batches than these: pass the same ones in the same order (a DataLoader "
                "with shuffle=False, no random augmentation), choose another file, or delete it"
            )
        if kept:
            stats.example = source.example
        for n, batch in enumerate(source, start=kept):
            stats = stats.merge(scan(model, [batch], n, where=where, channels=channels))
            if time.monotonic() - saved > SECONDS:
                keep()
    except FileExistsError:  # it is not this scan's
        raise
    except BaseException as error:
        if stats.batches > kept:
            keep()
        if kept:
            error.add_note(f"{kept} batches are kept in {path}: the same call goes on from there")
        raise
    if stats.batches > kept:
        keep()
    return stats


def _read(path: Path) -> tuple[Stats, dict[str, Any]]:
    """The statistics in the file, and what they are of; empty ones if there is no file."""
    from safetensors import safe_open

    if not path.exists():
        return Stats(), {}
    stats = Stats.load(path)
    with safe_open(path, framework="np") as file:
        there = json.loads(file.metadata()[STATS_KEY]).get("checkpoint")
    if there is None:
        raise FileExistsError(f"{path} holds finished statistics, of another call: choose another file for checkpoint")
    try:
        there = checked.fit(there, dict[str, str | bool], "checkpoint")
        checked.fit(there.get("batches"), str, "its batches")
        return stats, there
    except ValueError as error:
        raise ValueError(f"{path} does not say what was scanned ({error}): delete it") from error
