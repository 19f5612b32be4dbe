"""Memory in the course of long work; run by test_load.py and benchmarks/reliability.py.

Usage: python loads.py calibrate BATCHES, or python loads.py evaluate INPUTS. Prints JSON: resident bytes by step.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from nets import PreActResNet
from planted import evaluate, inputs, linear
from torch import Tensor

import forged_fx
from forged_fx.evaluate import blocks


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def calibration(batches: int) -> list[int]:
    found = []

    def made() -> Iterator[Tensor]:
        for _ in range(batches):
            yield torch.rand(8, 3, 16, 16)
            found.append(resident())

    forged_fx.calibrate(PreActResNet(8, (1, 1)), made())
    return found


def evaluation(n: int) -> list[int]:
    found, do = [], blocks.Blocks._do

    def done(self: blocks.Blocks, block: Tensor, work: Callable) -> bytes:
        answer = do(self, block, work)
        if work.__name__ == "search":  # an attack: what comes before takes less
            found.append(resident())
        return answer

    blocks.Blocks._do = done
    base, x = linear(classes=4), inputs(n)
    with TemporaryDirectory() as folder:
        evaluate(base, x=x, y=base(x).argmax(1), eps=0.02, attacks=["apgd-ce"], folder=folder)
    return found


def growth(found: list[int]) -> float:
    """From the second tenth of the work to the last, in share of the former; the largest of each."""
    tenth = len(found) // 10
    before, after = max(found[tenth : 2 * tenth]), max(found[-tenth:])
    return after / before - 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"calibrate": calibration, "evaluate": evaluation}[sys.argv[1]](int(sys.argv[2]))))
