"""A scan that may be killed: its statistics so far in a file, from which the same call goes on.

The file is one of `Stats`, and says besides what is being scanned: the model by its weights, and the batches so far by
a sum over all of them, so that other ones are noticed.
"""

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import filelock  # torch needs it too
import torch
from torch.utils._pytree import tree_leaves

from forged_fx import checked
from forged_fx.calibrate import model_inputs, scan
from forged_fx.evaluate import fingerprint
from forged_fx.stats import Stats

SECONDS = 60.0  # between two copies on the disk


def resumed(model: torch.nn.Module, batches: Iterable[Any], path: Path, *, where: str, channels: bool) -> Stats:
    """The statistics of all batches, those that an earlier call has scanned among them; exactly as `scan` has them.

    Batch by batch, and merged, so that what is kept is always the statistics of whole batches. BlockingIOError if
    another process works on the file.
    """
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BlockingIOError(f"another process works on {path}; wait for it, or choose another file") from None
    with held:
        return _resumed(model, batches, path, where, channels)


def _resumed(model: torch.nn.Module, batches: Iterable[Any], path: Path, where: str, channels: bool) -> Stats:
    asked = {"model": fingerprint.of_model(model), "where": where, "channels": channels}
    known, there = _read(path)
    different = [key for key, value in asked.items() if there.get(key, value) != value]
    if different:
        raise FileExistsError(
            f"{path} is a scan with another {', '.join(different)}: choose another file, or delete it"
        )
    stats, sums, n, done = Stats(), hashlib.sha256(), 0, ""
    saved, kept = time.monotonic(), known.batches

    def keep() -> None:
        nonlocal saved, kept
        stats.write(path, checkpoint=asked | {"batches": done})
        saved, kept = time.monotonic(), stats.batches

    try:
        for n, batch in enumerate(batches, start=1):
            inputs = model_inputs(batch, model)
            sums.update(fingerprint.of_tensors((str(i), leaf) for i, leaf in enumerate(tree_leaves(inputs))).encode())
            if n == 1:
                known.example = inputs
            if n > known.batches:
                stats = stats.merge(scan(model, [batch], n - 1, where=where, channels=channels))
                done = sums.hexdigest()
                if time.monotonic() - saved > SECONDS:
                    keep()
            elif n == known.batches:
                if sums.hexdigest() != there["batches"]:
                    raise FileExistsError(
                        f"{path} is a scan of other batches than these: pass the same ones in the same order (a "
                        "DataLoader with shuffle=False, no random augmentation), choose another file, or delete it"
                    )
                stats, done = known, there["batches"]
        if n < known.batches:
            raise FileExistsError(f"{path} is a scan of {known.batches} batches, and there are {n}: delete it")
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
        there = json.loads(file.metadata()["forged_fx.stats"]).get("checkpoint")
    if there is None:
        raise FileExistsError(f"{path} holds finished statistics, of another call: choose another file for checkpoint")
    try:
        there = checked.fit(there, dict[str, str | bool], "checkpoint")
        checked.fit(there.get("batches"), str, "its batches")
        return stats, there
    except ValueError as error:
        raise ValueError(f"{path} does not say what was scanned ({error}): delete it") from error
