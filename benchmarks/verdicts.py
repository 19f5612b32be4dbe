"""Verdicts on trained networks, plain and forged: a table, and rows in a CSV file.

    python benchmarks/verdicts.py digits@2**-7 zoo:cifar_resnet2b_adv@2**-5 --attacks quick

smooth: inputs that only the gradient of a smooth surrogate broke; the true and the straight-through one had left them.

A network is named as in benchmarks/evaluate_cost.py, then @ and the ratio at which it is forged; @0 judges the plain
network without a base, and shows how far its findings stay from their bounds.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from csv_rows import append, csv_file
from evaluate_cost import subject

import forged_fx
from forged_fx.evaluate import Result


def ratio_of(text: str) -> float:
    base, _, power = text.partition("**")
    return float(base) ** float(power or 1)


def judge(name: str, ratio: float, n: int, attacks: str | list[str], seed: int) -> tuple[Result, dict[str, Any]]:
    base, x_train, x, y, eps = subject(name, n)
    model = forged_fx.transform(base, forged_fx.calibrate(base, x_train.split(250)), ratio=ratio) if ratio else base
    began = time.perf_counter()
    result = forged_fx.evaluate(
        model, base=base if ratio else None, x=x, y=y, eps=eps, attacks=attacks, seed=seed, progress=False
    )
    counts = [" -> ".join(str(round(side.accuracy(kind) * len(x))) for side in reversed(result.sides))
              for kind in ("natural", "true gradient", result.kinds[-1])]  # fmt: skip
    p = result.compared()
    row = {
        "model": name, "ratio": f"{ratio:g}", "n": len(x), "eps": f"{eps:.5g}",
        "attacks": attacks if isinstance(attacks, str) else "+".join(attacks), "seed": seed,
        "natural": counts[0], "true gradient": counts[1], "worst case": counts[2],
        "smooth": sum(row.broken for row in result.model.rows if "sigmoid" in row.attack),
        "points": f"{100 * p.difference:+.1f}" if p else "",
        "interval": f"{100 * p.low:+.1f} to {100 * p.high:+.1f}" if p else "",
        "p": f"{p.p:.2g}" if p else "", "verdict": result.verdict,
        "raised": "; ".join(f"{f.name} {f.value:g} > {f.bound:g}" for f in result.findings if f.raised),
        "seconds": f"{time.perf_counter() - began:.0f}", "torch": torch.__version__,
    }  # fmt: skip
    return result, row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL@RATIO")
    parser.add_argument("-n", type=int, default=200, help="inputs (default: %(default)s)")
    parser.add_argument("--attacks", default="standard", help="a preset, or names joined by + (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=csv_file, default=Path(__file__).with_suffix(".csv"), help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    attacks = args.attacks.split("+") if "+" in args.attacks else args.attacks
    print("counts: base -> model, right under these attacks")
    for entry in args.models:
        name, _, ratio = entry.rpartition("@")
        result, row = judge(name, ratio_of(ratio), args.n, attacks, args.seed)
        print(", ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
        if not result.base:
            close = (f"{f.name} {f.value:g} (bound {f.bound:g})" for f in result.findings if f.value)
            print("  findings that are not 0: " + ", ".join(close), flush=True)
        append(args.csv, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
