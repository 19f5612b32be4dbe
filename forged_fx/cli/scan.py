"""A scan that can be interrupted: the statistics so far are kept beside the file, and the same command goes on."""

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

from forged_fx import Stats
from forged_fx.calibrate import scan as scan_part
from forged_fx.calibrate import together
from forged_fx.cli.output import Interrupted
from forged_fx.evaluate import fingerprint
from forged_fx.files import whole
from forged_fx.processes import joined
from forged_fx.progress import track
from forged_fx.sources import Batches, Model

CHUNK = 8  # batches between two looks at the clock
SECONDS = 60.0  # between two copies on the disk


def scan(model: Model, batches: Batches, out: Path, asked: dict[str, Any], **measured: Any) -> Stats:
    """The statistics of all batches, saved as `out`; exactly those of one `calibrate` over all of them.

    Under torchrun each of n processes scans every n-th batch, and keeps its own part.
    asked: what tells this scan from another. measured: as `calibrate` takes it.
    """
    asked = json.loads(json.dumps(asked | measured | {"weights": fingerprint.of_model(model.module)}))
    with joined(None, "forged-fx calibrate") as processes:
        share = f".{processes.rank}of{processes.size}" if processes.size > 1 else ""
        kept = out.with_name(f"{out.name}.unfinished{share}")
        mine = batches[processes.rank :: processes.size]
        stats = together(processes, lambda: _part(model, mine, kept, asked, measured))

        def save() -> bytes:
            stats.save(out)
            return b""

        processes.first(save)
        for path in (kept, _beside(kept)):
            path.unlink(missing_ok=True)
    return stats


def _part(model: Model, batches: Batches, kept: Path, asked: dict[str, Any], measured: dict[str, Any]) -> Stats:
    """The statistics of these batches; `kept` holds what an earlier attempt has."""
    stats, saved = _resume(kept, asked), time.monotonic()
    done = stats.batches
    todo = (model.inputs(x) for x, _ in track(batches[done:], "calibrating"))
    try:
        for start in range(done, len(batches), CHUNK):
            stats = stats.merge(scan_part(model.module, islice(todo, CHUNK), start, **measured))
            if time.monotonic() - saved > SECONDS:
                _keep(stats, kept, asked)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if stats.batches:
            _keep(stats, kept, asked)
        raise Interrupted(
            f"{stats.batches} of {len(batches)} batches are kept in {kept}; the same command goes on from there"
        ) from None
    return stats


def _beside(kept: Path) -> Path:
    return kept.with_name(f"{kept.name}.json")


def _keep(stats: Stats, kept: Path, asked: dict[str, Any]) -> None:
    stats.save(kept)
    with whole(_beside(kept)) as part:
        part.write_text(json.dumps(asked), encoding="utf-8")


def _resume(kept: Path, asked: dict[str, Any]) -> Stats:
    if not (kept.exists() and _beside(kept).exists()):
        return Stats()
    there = json.loads(_beside(kept).read_text(encoding="utf-8"))
    if there != asked:
        different = ", ".join(key for key in asked if there.get(key) != asked[key])
        raise FileExistsError(f"{kept} is of another scan ({different}): choose another --out, or delete it")
    return Stats.load(kept)
