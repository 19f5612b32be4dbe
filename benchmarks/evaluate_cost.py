"""What the worst-case protocol costs beside AutoAttack alone, on the same model and inputs: a ratio, and its spread.

    python benchmarks/evaluate_cost.py digits zoo:cifar_resnet2b_adv

The model is forged at ratio 2**-7. In each round pyautoattack's own run loop attacks the forged model ("standard"),
then `forged_fx.evaluate` judges it beside its base with attacks="standard": in turn and in one process, so that both
meet the same machine. The ratio counts everything that `evaluate` does: both sides, BPDA, transfer, findings.

Networks of the folder FORGED_FX_ASSETS are named zoo:NAME; "digits" is the demo's, trained here in some seconds.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from models import load
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


def alone(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    """Seconds of AutoAttack's standard version."""
    with contained():
        began = time.perf_counter()
        AutoAttack(model, norm="Linf", eps=eps, seed=0, version="standard").run_standard_evaluation(x, y)
        return time.perf_counter() - began


def measure(name: str, n: int, rounds: int) -> list[float]:
    """evaluate / AutoAttack, one ratio a round."""
    base, x_train, x, y, eps = subject(name, n)
    forged = forged_fx.transform(base, forged_fx.calibrate(base, x_train.split(250)), ratio=RATIO)
    for parameter in forged.parameters():
        parameter.requires_grad_(False)  # as `evaluate` does: neither pays for gradients that no attack wants
    ratios = []
    for i in range(rounds):
        one = alone(forged, x, y, eps)
        began = time.perf_counter()
        result = forged_fx.evaluate(forged, base=base, x=x, y=y, eps=eps, progress=False)
        both = time.perf_counter() - began
        ratios.append(both / one)
        if i == 0:
            spent = {side.name: sum(row.seconds for row in side.rows) for side in result.sides}
            bpda = sum(row.seconds for row in result.model.rows if row.kind == "BPDA")
            moved = sum(row.seconds for row in result.rows if row.kind == "transfer")
            rest = both - sum(spent.values())
            parts = {"model, true gradient": spent["model"] - bpda, "base": spent["base"], "BPDA": bpda}
            shares = ", ".join(f"{part} {seconds / one:.2f}" for part, seconds in parts.items())
            print(f"  {shares} (of which transfer {moved / one:.3f}), findings and the rest {rest / one:.3f}")
        print(f"  round {i + 1}: AutoAttack alone {one:.1f} s, evaluate {both:.1f} s, {ratios[-1]:.3f}", flush=True)
    return ratios


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="digits, or zoo:NAME")
    parser.add_argument("-n", type=int, default=200, help="inputs (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in args.models:
        print(name, flush=True)
        ratios = sorted(measure(name, args.n, args.rounds))
        print(f"  {name}, {args.n} inputs: {statistics.median(ratios):.2f} x ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
