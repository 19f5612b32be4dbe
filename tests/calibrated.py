"""What each process of test_calibrate_sharded.py does: `python torchrun.py calibrated.py FOLDER`.

Process k writes what it saw to FOLDER/k.json.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import forged_fx
from forged_fx.cli import main


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 5)
    return nn.Sequential(*layers).eval()


def batches():
    return torch.rand(36, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(8)  # 5, so that shares differ


def fails(act):
    try:
        act()
    except Exception as error:
        return [type(error).__name__, str(error)]


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    share, seen = batches()[rank::2], {}
    alone = forged_fx.calibrate(network(), batches(), shard=False, channels=True)
    if rank == 0:
        alone.save(folder / "alone")
    found = forged_fx.calibrate(network(), share, channels=True)
    found.save(folder / f"shared{rank}")
    seen["plain"] = found == alone
    seen["example"] = torch.equal(found.example[0][0], share[0])
    seen["one has none"] = forged_fx.calibrate(network(), share if rank else []).batches
    seen["none has any"] = fails(lambda: forged_fx.calibrate(network(), []))
    bad = torch.full_like(share[0], float("inf") if rank else 1)
    seen["one fails"] = fails(lambda: forged_fx.calibrate(network(), [bad]))
    os.chdir(folder)
    command = ["calibrate", "calibrated:network", "--data", "npz:images.npz", "--batch", "8", "--out", "terminal"]
    seen["terminal"] = main([*command, "--channels"])

    torch.distributed.init_process_group("gloo")
    seen["data parallel"] = forged_fx.calibrate(DistributedDataParallel(network()), share, channels=True) == alone
    forged = forged_fx.transform(DistributedDataParallel(network()), alone, 2**-3)
    x = batches()[0]
    seen["data parallel, forged"] = torch.equal(DistributedDataParallel(forged)(x), forged(x))
    sharded = network()
    for module in (sharded[3], sharded):
        fully_shard(module)
    seen["of another length"] = fails(lambda: forged_fx.calibrate(sharded, share))
    both = forged_fx.calibrate(sharded, batches()[:4][rank::2])
    one = forged_fx.calibrate(network(), batches()[:4], shard=False)
    seen["sharded"] = both.sites == one.sites and both.fits(network())
    seen["transform"] = fails(lambda: forged_fx.transform(sharded, both))
    expected = forged(x)
    fully_shard(forged)
    seen["forged, then sharded"] = torch.equal(forged(x), expected)
    blocks = nn.Sequential(network())
    of_blocks = forged_fx.calibrate(blocks, batches()[:1], shard=False)
    graph, modules = (forged_fx.transform(blocks, of_blocks, 2**-4, graph=graph) for graph in (True, False))
    expected = graph(x)
    with warnings.catch_warnings(record=True) as told:
        fully_shard(graph.get_submodule("0"))
    seen["a block of a graph"] = [str(warning.message) for warning in told]
    for name in ("0", ""):
        fully_shard(modules.get_submodule(name))
    seen["block by block"] = torch.equal(modules(x), expected)
    torch.distributed.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(seen))
