"""What the worst-case protocol costs beside AutoAttack alone, on the same model and inputs: a ratio, and its spread.

    python benchmarks/evaluate_cost.py digits zoo:cifar_resnet2b_adv

The model is forged at ratio 2**-7. In each round pyautoattack's own run loop attacks the forged model ("standard"),
then `forged_fx.evaluate` judges it beside its base with attacks="standard": in turn and in one process, so that both
meet the same machine. The ratio counts everything that `evaluate` does: both sides, BPDA, transfer, findings.

One thread. Three ratios: of wall time; of this process's CPU time, which others disturb less; and of passes, which
nothing disturbs: inputs sent forward through a network, and gradients sent back, counted alike for model and base.

Networks of the folder FORGED_FX_ASSETS are named zoo:NAME; "digits" is the demo's, trained here in some seconds.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import load, model_name
from pyautoattack import AutoAttack, checks
from torch import Tensor, nn

import forged_fx
from forged_fx import digits

RATIO = 2**-7


def subject(name: str, n: int) -> tuple[nn.Module, Tensor, Tensor, Tensor, float]:
    """Base, calibration inputs, x, y, eps (Linf)."""
    if name == "digits":
        base, x_train, _, x, y = digits.train_digits(0)
        return base, x_train, x[:n], y[:n], digits.EPS
    source, _, rest = name.partition(":")
    if source != "zoo":
        raise ValueError(f"{name!r}: digits, or zoo:NAME for a network of the folder FORGED_FX_ASSETS")
    base, _ = load(name)
    folder = Path(os.environ["FORGED_FX_ASSETS"])
    eps = json.loads((folder / "models" / rest / "config.json").read_text())["eps"]
    train, test = ("mnist_train", "mnist_test") if rest.startswith("mnist") else ("cifar10jpeg_train", "cifar10raw_300")
    x_train, _ = images(folder / "data" / f"{train}.npz", 2000)
    return base, x_train, *images(folder / "data" / f"{test}.npz", n), eps


def images(path: Path, n: int) -> tuple[Tensor, Tensor]:
    with np.load(path) as data:
        x, y = torch.from_numpy(data["x"][:n]).float().div(255), torch.from_numpy(data["y"][:n]).long()
    return (x.permute(0, 3, 1, 2) if x.dim() == 4 else x.unsqueeze(1)).contiguous(), y


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """pyautoattack's loop takes the process's trace function, counts in a module global, and warns."""
    trace, counts = sys.gettrace(), dict(checks.funcs)
    try:
        yield
    finally:
        sys.settrace(trace)
        checks.funcs.update(counts)


class Passes:
    """Counts what goes through some networks."""

    def __init__(self, *networks: nn.Module) -> None:
        self.count = 0
        for network in networks:
            network.register_forward_pre_hook(self._see)

    def _see(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        self.count += len(x) * (2 if torch.is_grad_enabled() and x.requires_grad else 1)


def timed(work: Callable[[], Any], passes: Passes) -> tuple[Any, tuple[float, float, int]]:
    """What it returns; its seconds of wall and of CPU time, and its passes."""
    wall, cpu, count = time.perf_counter(), time.process_time(), passes.count
    result = work()
    return result, (time.perf_counter() - wall, time.process_time() - cpu, passes.count - count)


def measure(name: str, n: int, rounds: int) -> list[tuple[float, ...]]:
    """evaluate / AutoAttack, one triple of ratios a round: wall time, CPU time, passes."""
    base, x_train, x, y, eps = subject(name, n)
    forged = forged_fx.transform(base, forged_fx.calibrate(base, x_train.split(250)), ratio=RATIO)
    for parameter in forged.parameters():
        parameter.requires_grad_(False)  # as `evaluate` does: neither pays for gradients that no attack wants
    ratios, passes = [], Passes(base, forged)
    for i in range(rounds):
        with contained():
            attack = AutoAttack(forged, norm="Linf", eps=eps, seed=0, version="standard")
            _, alone = timed(lambda: attack.run_standard_evaluation(x, y), passes)  # noqa: B023
        options = {"base": base, "x": x, "y": y, "eps": eps, "progress": False}
        result, both = timed(lambda: forged_fx.evaluate(forged, **options), passes)  # noqa: B023
        ratios.append(tuple(b / a for a, b in zip(alone, both, strict=True)))
        rows = {
            "model, true gradient": [r for r in result.model.rows if r.kind == "true gradient"],
            "model, BPDA": [r for r in result.model.rows if r.kind == "BPDA"],
            "base": [r for r in result.base.rows if r.kind != "transfer"],
            "transfer": [r for r in result.rows if r.kind == "transfer"],
        }
        parts = {part: sum(row.seconds for row in some) for part, some in rows.items()}
        parts["findings and the rest"] = both[0] - sum(parts.values())
        shares = ", ".join(f"{part} {seconds / both[0]:.1%}" for part, seconds in parts.items())
        print(f"  round {i + 1}: AutoAttack alone {alone[0]:.1f} s, evaluate {both[0]:.1f} s ({shares})", flush=True)
    return ratios


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=model_name, metavar="MODEL", help="digits, or zoo:NAME")
    parser.add_argument("-n", type=int, default=200, help="inputs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in args.models:
        print(name, flush=True)
        rounds = measure(name, args.n, args.rounds)
        for what, ratios in zip(("wall time", "CPU time", "passes"), zip(*rounds, strict=True), strict=True):
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(f"  {name}, {args.n} inputs, {what}: {middle:.2f} x ({low:.2f} to {high:.2f})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
