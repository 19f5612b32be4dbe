"""Throughput of plain and forged models, eager and compiled: a table, and rows in a CSV file.

    python benchmarks/throughput.py torchvision:resnet18 preact:28-4 digits

The four variants of a model run in turn (see forged_fx/throughput.py). The ratio is the forged model's throughput over
the plain one's: 1 is free, 0.9 a tenth slower. Plain is compiled with Inductor, forged with backend="forged".
"""

import argparse
import sys
from pathlib import Path

import torch
from csv_rows import append, csv_file, taken_on
from models import load, model_name

import forged_fx
from forged_fx.throughput import MODES, Speed, compare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# the table's columns, in the order printed: a CSV row's key -> how wide, and how a figure is written
COLUMNS = {
    "model": ("<32", ""), "sites": (">5", ""), "mode": ("<8", ""), "batch": (">5", ""), "dtype": ("<8", ""),
    "threads": (">7", ""), "plain_ms": (">9", ".3f"), "forged_ms": (">9", ".3f"),
    "ratio": (">6", ".3f"), "low": (">6", ".3f"), "high": (">6", ".3f"),
}  # fmt: skip


def measure(name: str, args: argparse.Namespace) -> tuple[int, list[Speed]]:
    """How many sites of the model are forged, and its speeds."""
    torch._dynamo.reset()  # one model's compilations must not count against the next one's limit
    model, shape = load(name)
    model = model.to(args.device, DTYPES[args.dtype])
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(args.batch, *shape, generator=generator).to(args.device, DTYPES[args.dtype])
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), ratio=2**-6)
    sites = sum(row.left_out is None for row in forged_fx.describe(forged))
    return sites, compare(model, forged, x, rounds=args.runs, modes=args.modes)


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=model_name, metavar="MODEL", help="see benchmarks/models.py")
    parser.add_argument("--batch", type=int, default=8, help="inputs per forward pass (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--runs", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=csv_file, default=Path(__file__).with_suffix(".csv"), help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    where = {"threads": torch.get_num_threads(), **taken_on(args.device)}
    print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}, {args.runs} rounds, in turn")
    print("ms: the fastest round; ratio: throughput forged / plain, median over the rounds; low, high: its quartiles")
    print(" ".join(f"{key:{width}}" for key, (width, _) in COLUMNS.items()))
    try:
        for name in args.models:
            sites, speeds = measure(name, args)
            for s in speeds:
                figures = {"plain_ms": 1e3 * s.plain, "forged_ms": 1e3 * s.forged, "ratio": s.ratio}
                row = {"model": name, "sites": sites, "mode": s.mode, "batch": args.batch, "dtype": args.dtype}
                row |= {"runs": args.runs, **where, **figures, "low": s.low, "high": s.high}
                print(" ".join(f"{row[key]:{w}{form}}" for key, (w, form) in COLUMNS.items()), flush=True)
                append(args.csv, row)
    except (ValueError, OSError) as error:
        print(f"throughput.py: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    print(f"rows added to {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
