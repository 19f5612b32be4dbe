"""Processes that are slow, late, absent or gone; run by test_processes.py: `python late.py FOLDER`.

Prints JSON: for each case what each of two processes returned or raised, and what they said on standard error.
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from calibrated import fails
from killed import hurry
from planted import Hidden, inputs, linear, straight_through

import forged_fx
from forged_fx import checkpoint, processes
from forged_fx.evaluate import blocks, fingerprint

WAITS = 2.5  # times as long as the others' patience


def evaluated(folder, **options):
    hurry(7)
    base, x = linear(classes=4), inputs(30)
    call = {"x": x, "y": base(x).argmax(1), "eps": 0.05, "attacks": ["step"], "bpda": straight_through}
    result = forged_fx.evaluate(Hidden(base), base, **call, folder=folder / "run", **options)
    return fingerprint.of_tensors([(side.name, side.broken_by) for side in result.sides])


def calibrated(folder, batches, **options):
    stats = forged_fx.calibrate(linear(), batches, **options)
    return [stats.batches, *(site.c_max for site in stats.sites.values())]


def patience():
    return WAITS * processes.PATIENCE.total_seconds()


def slow(folder, rank):
    """Process 1 takes long for its third block, longer than anyone is waited for at the beginning."""
    do, done = blocks.Blocks._do, []

    def slowly(*args):
        done.append(1)
        if rank == 1 and len(done) == 3:
            time.sleep(patience())
        return do(*args)

    blocks.Blocks._do = slowly
    return evaluated(folder)


def slow_batches(folder, rank):
    def batches():
        for batch in inputs(24).split(4)[rank::2]:
            time.sleep(rank * patience() / 3)
            yield batch

    return calibrated(folder, batches())


def late(folder, rank):
    """Process 0 comes to the call when half of the patience is spent."""
    time.sleep((1 - rank) * processes.PATIENCE.total_seconds() / 2)
    return calibrated(folder, inputs(24).split(4)[rank::2])


def absent(folder, rank):
    """Process 1 comes when process 0 has given up, which calls again."""
    if rank == 1:
        time.sleep(patience())
        return evaluated(folder)
    first = fails(lambda: evaluated(folder))
    time.sleep(patience() - processes.PATIENCE.total_seconds())
    return [first, evaluated(folder)]


def gone(folder, rank):
    """Process 1 ends in the middle of its scan; a second pair does the same again."""
    checkpoint.SECONDS = 0.0

    def batches():
        for k, batch in enumerate(inputs(24).split(4)[rank::2]):
            if rank == 1 and k == 2 and not (folder / "again").exists():
                (folder / "again").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    return fails(lambda: calibrated(folder, batches(), checkpoint=folder / f"scan{rank}"))


def go_on(folder, rank):
    scanned, scan = [], checkpoint.scan
    checkpoint.scan = lambda *args, **kwargs: scanned.append(1) or scan(*args, **kwargs)
    found = calibrated(folder, inputs(24).split(4)[rank::2], checkpoint=folder / f"scan{rank}")
    return [found, len(scanned)]


def pair(case, folder):
    """What two processes return from a case, and what they say."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{store.port}", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            os.environ |= found | {"RANK": f"{rank}", "WORLD_SIZE": "2"}
            os.dup2(os.open(folder / f"{case.__name__}{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
            outcome = json.dumps(case(folder, rank))
            (folder / f"{case.__name__}{rank}.json").write_text(outcome)
            sys.stderr.flush()
            os._exit(0)
        started.append(child)
    for child in started:
        os.waitpid(child, 0)
    files = [folder / f"{case.__name__}{rank}" for rank in (0, 1)]
    results = [file.with_suffix(".json") for file in files]
    return {
        "found": [json.loads(path.read_text()) if path.exists() else None for path in results],
        "said": [file.with_suffix(".err").read_text() for file in files],
    }


if __name__ == "__main__":
    where = Path(sys.argv[1])
    torch.set_num_threads(1)
    processes.PATIENCE, processes.WORD = timedelta(seconds=1), timedelta(seconds=0.25)
    told = {"evaluated": evaluated(where / "alone", shard=False)}  # first: what is imported here is not in each fork
    told["calibrated"] = calibrated(where, inputs(24).split(4), shard=False)
    for case in (slow, slow_batches, late, absent, gone, go_on):
        folder = where / ("gone" if case is go_on else case.__name__)
        folder.mkdir(exist_ok=True)
        told[case.__name__] = pair(case, folder)
    print(json.dumps(told))
