"""What each process of test_evaluate_sharded.py does: `python torchrun.py sharded.py FOLDER`.

Process k writes what it saw to FOLDER/k.json. With a second argument, "kill", process 1 kills itself in the middle
(test_faults.py).
"""

import copy
import json
import os
import signal
import sys
from pathlib import Path

import torch
from killed import hurry
from planted import Hidden, inputs, linear, straight_through
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import forged_fx
from forged_fx.evaluate import blocks, fingerprint


class Failing(Hidden):
    """In process 1 it fails when it is attacked, after the base was: as a process that is out of memory does."""

    rank, asked = -1, 0  # asked: for gradients; the first are those that are kept of it, before any attack

    def forward(self, x):
        if self.rank == 1 and torch.is_grad_enabled() and x.requires_grad:
            Failing.asked += 1
            if Failing.asked > 1:
                raise MemoryError("no memory left")
        return super().forward(x)


def case():
    hurry(7)
    base, x = linear(classes=4), inputs(45)
    y = base(x).argmax(1)
    y[:3] = (y[:3] + 1) % 4
    call = {"x": x, "y": y, "eps": 0.05, "attacks": ["step", "mi-fgsm"], "bpda": straight_through}
    return Failing(base), base, call


def digest(result):
    tensors = [(str(i), t) for i, side in enumerate(result.sides) for t in (side.broken_by, side.examples)]
    rows = [[row.attacked, row.broken, row.standing, row.rejected, row.alone, row.note] for row in result.rows]
    return [fingerprint.of_tensors(tensors), rows, [str(finding) for finding in result.findings]]


def fails(model, base, call):
    try:
        forged_fx.evaluate(model, base, **call)
    except Exception as error:
        return [type(error).__name__, str(error)]


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    model, base, call = case()
    seen = {"done": 0}
    do = blocks.Blocks._do

    def counted(self, block, work):
        seen["done"] += 1
        return do(self, block, work)

    blocks.Blocks._do = counted
    if sys.argv[2:] == ["kill"] and rank == 1:
        blocks.Blocks._do = lambda *args: os.kill(os.getpid(), signal.SIGKILL) if seen["done"] > 20 else counted(*args)
    seen["result"] = digest(forged_fx.evaluate(model, base, folder=folder / "shared", **call))
    seen["blocks"] = seen["done"]
    seen["initialised"] = torch.distributed.is_initialized()
    seen["other seed"] = fails(model, base, call | {"seed": rank})
    Failing.rank = rank
    seen["failed"] = fails(model, base, call | {"folder": folder / "failed"})
    Failing.rank = -1
    # the caller's own group, as data-parallel training has it
    torch.distributed.init_process_group("gloo")
    wrapped = copy.deepcopy(base)
    wrapped.register_buffer("sent_around", torch.zeros(1))  # ahead of each run: processes wait for each other
    wrapped = torch.nn.parallel.DistributedDataParallel(wrapped)
    seen["data parallel"] = digest(forged_fx.evaluate(model, wrapped, **call))
    compiled = torch.compile(torch.nn.Sequential(wrapped))  # (each would wait for the other for ever)
    seen["within"] = fails(model, compiled, call)
    torch.distributed.fsdp.fully_shard(sharded := copy.deepcopy(base))
    seen["sharded"] = fails(sharded, base, call)
    whole = {"options": StateDictOptions(full_state_dict=True)}
    (gathered := copy.deepcopy(base)).load_state_dict(get_model_state_dict(sharded, **whole))
    seen["gathered"] = digest(forged_fx.evaluate(model, gathered, **call))
    seen["done"] = 0
    seen["resumed"] = digest(forged_fx.evaluate(model, base, **call, folder=folder / "failed"))
    seen["finished"] = digest(forged_fx.evaluate(model, base, **call, folder=folder / "failed"))
    if rank == 1:  # not all of the processes
        seen["alone"] = digest(forged_fx.evaluate(model, base, **call, shard=False))
    seen["still initialised"] = torch.distributed.is_initialized()
    torch.distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(seen))
