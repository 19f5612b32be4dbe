"""What forging costs beside adversarial training of the same model: seconds of each step, and overhead at inference.

    python benchmarks/training_cost.py digits
    python benchmarks/training_cost.py preact:28-10 --images 32 --batch 8 --rounds 3

The demo's network, "digits", is adversarially trained here, on this machine, in one thread. No other is: for a network
of CIFAR-10 the time of training is what its sources report, on their machine, and is marked as such. Calibration takes
seconds per image, so that the figure holds for any number of them. Times are wall time; where everything happens in
this process and thread, CPU time stands beside it, which other work on the machine disturbs less.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from csv_rows import device_name
from models import load, model_name

import forged_fx
from forged_fx import digits, throughput

# What arXiv 2406.19622 reports of WideResNets on CIFAR-10, on one V100.
SOURCES = "20+ hours with AWP, 200+ of the best models; calibration of the whole training set under 5 minutes"


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, and its seconds of wall and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure(name: str, images: int, batch: int, rounds: int, compiled: bool) -> None:
    def say(what: str, figure: str) -> None:
        print(f"  {what:34} {figure}", flush=True)

    print(name)
    if name == "digits":
        (model, x, *_), wall, cpu = timed(lambda: digits.train_digits(0))
        say("adversarial training, measured", f"{wall:.1f} s ({cpu:.1f} s of CPU time)")
    else:
        model, shape = load(name)
        x = torch.rand(images, *shape, generator=torch.Generator().manual_seed(0))
        say("adversarial training, reported", f"{SOURCES} (arXiv 2406.19622; their machine, not this one)")
    x = x[:images]
    stats, wall, cpu = timed(lambda: forged_fx.calibrate(model, x.split(batch)))
    say(
        f"calibration, {len(x)} images", f"{wall:.2f} s ({cpu:.2f} s of CPU time, {1e3 * cpu / len(x):.2f} ms an image)"
    )
    forged, wall, cpu = timed(lambda: forged_fx.transform(model, stats, ratio=2**-7))
    say("transform, audit included", f"{wall:.2f} s ({cpu:.2f} s of CPU time)")
    forged_fx.set_ratio(forged, 2**-6)  # loads what is loaded once
    _, wall, _ = timed(lambda: forged_fx.set_ratio(forged, 2**-7))
    say("another ratio", f"{1e3 * wall:.2f} ms")
    one = x[:batch]
    if compiled:
        from torch._inductor.utils import fresh_cache

        torch.compile(torch.nn.Linear(2, 2))(torch.zeros(1, 2))  # loads the compiler
        with fresh_cache(), torch.no_grad():
            _, wall, _ = timed(lambda: torch.compile(model)(one))
            say("compilation, plain model", f"{wall:.1f} s")
            _, wall, _ = timed(lambda: torch.compile(forged, backend="forged")(one))
            say("compilation, forged", f"{wall:.1f} s")
    for speed in throughput.compare(model, forged, one, rounds=rounds, modes=["eager", *["compiled"] * compiled]):
        share = f"{speed.ratio:.3f} ({speed.low:.3f} to {speed.high:.3f})"
        say(
            f"throughput of the plain one's, {speed.mode}",
            f"{share}, batch {len(one)}, {1e3 * speed.plain:.2f} ms plain",
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="+", type=model_name, metavar="MODEL", help="digits, or a name of benchmarks/models.py"
    )
    parser.add_argument("--images", type=int, default=1597, help="to calibrate on (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=200, help="images a forward pass (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="of timing (default: %(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"{device_name('cpu')}, one thread, torch {torch.__version__}")
    for name in args.models:
        measure(name, args.images, args.batch, args.rounds, args.compile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
