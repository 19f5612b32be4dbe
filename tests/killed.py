"""A program that starts a piece of work, kills it, and starts it again; run by test_evaluate_resume.py and others.

Usage: python killed.py FOLDER KILLS [evaluate, calibrate, sweep or search]. Prints JSON. Each attempt is a fork of this
process, which has imported torch already; a kill is a SIGKILL, at a moment when the attempt is about to change
something on the disk.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from planted import Hidden, inputs, linear, straight_through

import forged_fx
from forged_fx import checkpoint
from forged_fx.evaluate import blocks, probes
from forged_fx.evaluate.attacks import ATTACKS, Attack


def step(tools, x, y):
    """A step that is mostly chance, so that an attack at other random numbers would find other examples."""
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(tools.model(leaf), y), leaf)
    return (x + 0.1 * (grad.sign() + 3 * torch.randn_like(x)).sign()).clamp(0, 1)


def hurry(block):
    """Small blocks, quick attacks, few probes."""
    blocks.BLOCK, probes.STEPS, probes.RADII = block, (1, 2), (1.0,)
    ATTACKS["step"], ATTACKS["again"] = Attack("step", step), Attack("again", step)


def evaluate(folder):
    hurry(6)
    base, x = linear(classes=4), inputs(24)
    y = base(x).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    attacks = ["step", "again"]
    return forged_fx.evaluate(
        Hidden(base), base, x=x, y=y, eps=0.1, attacks=attacks, bpda=straight_through, folder=folder, progress=False
    )


def calibrate(folder):
    """A checkpoint after every batch."""
    checkpoint.SECONDS = 0.0
    batches = inputs(24).split(3)
    folder.mkdir(exist_ok=True)
    stats = forged_fx.calibrate(linear(classes=4), batches, checkpoint=folder / "checkpoint", channels=True)
    stats.save(folder / "stats")


def sweep(folder, share=slice(None), **options):
    """share: which of two batches this process calibrates on."""
    hurry(6)
    base, x = linear(classes=4), inputs(24)
    y = base(x).argmax(1)
    options = {"eps": 0.1, "ratios": (2**-6, 0.25), "attacks": ["step"], "rounds": 0, "folder": folder} | options
    return forged_fx.sweep(base, x.split(12)[share], x, y, **options, progress=False)


def search(folder, **options):
    hurry(6)
    base, x = linear(classes=4), inputs(24)
    y = base(x).argmax(1)
    stats = forged_fx.calibrate(base, [x], shard=False)
    options = {
        "eps": 0.1,
        "attacks": ["step"],
        "kinds": ("clamp",),
        "budget": 6,
        "finalists": 1,
        "max_natural_loss": 0.5,
        "folder": folder,
    } | options
    return forged_fx.search(base, stats, x, y, **options, progress=False)


# name -> (the work, what counts as a part of it: a function of a module or class)
WORKS = {"evaluate": (evaluate, blocks.Blocks, "_do"), "calibrate": (calibrate, checkpoint, "scan")}
WORKS |= {name: (work, blocks.Blocks, "_do") for name, work in (("sweep", sweep), ("search", search))}


RESULTS = ("/result.json", "/stats", "sweep.json", "search.json")


def count_changes(limit=None, on_change=None):
    """Calls `on_change` at each change of the disk, until `limit` changes were made: then the process dies."""
    made = 0

    def audit(event, args):
        nonlocal made
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        changes = writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if changes and (str(args[0]).startswith(FOLDER) or not os.path.isabs(args[0])):  # rmtree's are relative
            made += 1
            if made == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            if on_change:
                on_change(str(args[1] if event == "os.rename" else args[0]))

    sys.addaudithook(audit)


def attempt(folder, limit=None):
    """[how it ended: 0 or the signal; changes made; blocks done; the changes] of one attempt in its own process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        done, changed = [], []
        count_changes(limit, changed.append)
        work, owner, part = WORK
        before = getattr(owner, part)
        setattr(owner, part, lambda *args, **kwargs: done.append(1) or before(*args, **kwargs))
        work(folder)
        os.write(write, json.dumps([len(changed), len(done), changed]).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    return [os.WTERMSIG(status), *(json.loads(said) if said else [None, None, None])]


def content(folder):
    """Every file that must not depend on how often the run was killed: all but logs, times and dated pictures."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if (
            path.name not in ("log.txt", "timing.json", "search.csv") and path.suffix != ".svg"
        ):  # search.json has it all
            record = path.name in ("sweep.json", "search.json")
            found[str(path.relative_to(folder))] = (
                timeless(json.loads(path.read_text())) if record else path.read_bytes().hex()
            )
    return found


def timeless(value):
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if key != "seconds"}
    return [timeless(part) for part in value] if isinstance(value, list) else value


if __name__ == "__main__":
    FOLDER, kills, WORK = sys.argv[1], int(sys.argv[2]), WORKS[(sys.argv[3:] or ["evaluate"])[0]]
    sys.argv = sys.argv[:1]
    torch.set_num_threads(1)
    folder = Path(FOLDER)
    folder.mkdir(exist_ok=True)
    WORK[0](folder / "first")  # so that everything is imported here, and not in each fork
    whole = attempt(folder / "whole")
    expected = content(folder / "whole")
    changes = whole[1]
    result = next(i for i, name in enumerate(whole[3]) if name.endswith(RESULTS))
    # spread over all, and around the moment when the result is there and the journal still is
    moments = sorted(
        {result, result + 1, result + 2, *(1 + k * (changes - 1) // (kills - 4) for k in range(kills - 3))}
    )
    once = []
    for moment in moments:
        where = folder / f"at-{moment}"
        killed, resumed = attempt(where, moment), attempt(where)
        once.append([moment, killed[0], resumed[0], resumed[2], content(where) == expected])
    # one run, killed again and again
    where, ends, chance = folder / "often", [], random.Random(0)
    while not ends or ends[-1]:
        ends.append(attempt(where, chance.randint(1, changes // 4))[0])
    often = [ends, content(where) == expected]
    print(json.dumps({"changes": changes, "blocks": whole[2], "once": once, "often": often}))
