"""What forging does inside a trained network: how much each site zeroes, and whether the model is smoother for it.

    python benchmarks/inside.py digits zoo:cifar_resnet2b_adv --ratio 2**-6 -n 30 --folder runs/inside
    python benchmarks/inside.py digits --kind clamp --ratio 0.7

A network is named as in benchmarks/evaluate_cost.py. Shares are counted on up to 1,000 of its training images, on which
it is calibrated; Lipschitz figures are taken at n test images. Into the folder go, for each network, tables as CSV and
JSON, and pictures.
"""

import argparse
import time
from pathlib import Path

import torch
from evaluate_cost import subject
from verdicts import ratio_of

import forged_fx
from forged_fx.kinds import KINDS


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--kind", choices=list(KINDS), default="hard")
    parser.add_argument("--ratio", default="2**-6", help="for band two, joined by a comma (default: %(default)s)")
    parser.add_argument("-n", type=int, default=30, help="test images (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for tables and pictures; printed only where it is left out")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    ratios = tuple(map(ratio_of, args.ratio.split(",")))
    for name in args.models:
        began = time.perf_counter()
        base, x_train, x, _, eps = subject(name, args.n)
        batches = x_train[:1000].split(100)
        stats = forged_fx.calibrate(base, batches, channels=args.kind == "mean")
        forged = forged_fx.transform(base, stats, ratios if len(ratios) > 1 else ratios[0], kind=args.kind)
        found = {
            "sparsity": forged_fx.sparsity(forged, batches),
            "lipschitz": forged_fx.lipschitz(base, forged, x, eps=eps),
        }
        print(f"{name}, {args.kind} at {args.ratio}, {len(x)} test images, eps {eps:.3g}")
        for what, result in found.items():
            print(f"\n{result}\n")
            if args.folder:
                args.folder.mkdir(parents=True, exist_ok=True)
                stem = args.folder / f"{name.replace(':', '-')}-{what}"
                for suffix in (".json", ".csv"):
                    result.save(stem.with_suffix(suffix))
                result.plot(stem.with_suffix(".svg"))
        print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
