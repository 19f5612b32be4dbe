"""What each process of test_search_sharded.py does: `python torchrun.py searched.py FOLDER`, or by torchrun itself
with "kill".

Process k writes what it saw to FOLDER/k.json. With "kill", process 1 kills itself in the middle of the search.
"""

import itertools
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from killed import search, sweep

from forged_fx.evaluate import blocks

SWEEP, SEARCH = {"ratios": [0.25]}, {"budget": 2}


def clock(step=0.0):
    """The blocks' clock goes on by so much whenever it is looked at."""
    ticks = itertools.count()
    blocks.time = SimpleNamespace(perf_counter=lambda: step * next(ticks))


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    share = slice(rank, None, 2)
    kill, sys.argv = sys.argv[2:] == ["kill"], ["searched"]
    clock()
    done, do = [], blocks.Blocks._do
    blocks.Blocks._do = lambda *args: done.append(1) or do(*args)
    seen = {"swept": repr(sweep(folder / "sweep", share, **SWEEP))}
    seen["sweep's blocks"] = len(done)
    done.clear()
    if kill and rank == 1:
        counted = blocks.Blocks._do
        blocks.Blocks._do = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if len(done) > 5 else counted(*args)
    seen["found"] = str(search(folder / "search", **SEARCH))
    seen["search's blocks"] = len(done)
    clock(1.0 + rank)  # slower than process 0
    limited = search(None, seconds=8.0)
    seen["in time"] = [[str(trial.configuration), trial.seconds] for trial in limited.trials]
    seen["speeds"] = [point.speed for point in sweep(None, share, **SWEEP, rounds=1).points]
    (folder / f"{rank}.json").write_text(json.dumps(seen))
