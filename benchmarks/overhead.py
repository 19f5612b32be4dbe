"""What forging costs on the CPU, beside what people would write by hand: a table, and rows in a CSV file.

    python benchmarks/overhead.py                                  the six models, batch 1 and 8, float32 and bfloat16
    python benchmarks/overhead.py torchvision:resnet18 --batch 8 --dtype float32
    python benchmarks/overhead.py --what eager calibration         two of the modes below

Throughput as a share of the plain model's in the same mode (1: free), the median over rounds in turn, and its
quartiles. With one thread what is measured is CPU time, so that other processes do not count. Where in memory things
lie moves a ratio by some percent, as much as what is measured; so weights are put elsewhere every few rounds, and the
quartiles tell of that, too:

    eager     plain, forged, and each layer wrapped by hand: torch.where(x.abs() < t, 0, x)
    compiled  plain (Inductor), forged (backend="forged"), the wrapper, and a custom op that Inductor cannot look into
    frozen    plain and forged, compiled with freezing=True (parameters are constants)

Calibration is set against forward passes of the same batches, and so is its first part, watching the run and doing
nothing; compile time, CPU seconds from empty caches, against Inductor's: all, Python's part and the C++ compilers'.

The last lines hold the means and the worst against `AIMS`. Under a row that misses its aim stand the operators that
take longer than in the plain model (see where_time_goes.py).
"""

import argparse
import copy
import functools
import gc
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import where_time_goes
from csv_rows import append, csv_file, taken_on
from models import load, model_name
from throughput import DTYPES
from torch import Tensor, nn

import forged_fx
from forged_fx.observe import Observer
from forged_fx.throughput import interleave, relative

MODELS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "preact:28-4",
    "timm:convnext_tiny",
    "timm:vit_small_patch16_224",
    "timm:swin_tiny_patch4_window7_224",
)
BY_HAND = ("where by hand", "opaque op")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
RATIO = 2**-6
# (mode, variant) -> the least ratio aimed at: the geometric mean over all models, and each model's
AIMS = {
    ("compiled", "forged"): (0.99, 0.97),
    ("frozen", "forged"): (0.99, 0.97),
    ("eager", "forged"): (0.97, None),
    ("calibration", "calibrate"): (None, 1 / 1.10),
    ("compile-time", "forged"): (None, 1 / 1.10),
}
NO_AIM = (None, None)


@torch.library.custom_op("forged_fx_overhead::opaque", mutates_args=())
def opaque(x: Tensor, t: Tensor) -> Tensor:
    return torch.where(x.abs() < t, 0, x)


@opaque.register_fake
def _(x: Tensor, t: Tensor) -> Tensor:
    return torch.empty_like(x)


class ByHand(nn.Module):
    """A layer and the threshold ahead of it, as a wrapper."""

    def __init__(self, layer: nn.Module, t: float, cut: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.cut = layer, cut
        self.register_buffer("t", torch.tensor(t))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.cut(x, self.t))


def where(x: Tensor, t: Tensor) -> Tensor:
    return torch.where(x.abs() < t, 0, x)


def by_hand(model: nn.Module, thresholds: dict[str, float], cut: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """A copy with every layer that has a threshold wrapped. (Sites that are no layers are out of a wrapper's reach.)"""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LAYERS) and name in thresholds:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ByHand(layer, thresholds[name], cut))
    return model


Variants = dict[tuple[str, str], Callable[[], object]]


def eager(model: nn.Module, forged: nn.Module, stats: forged_fx.Stats, x: Tensor) -> Variants:
    wrapped = by_hand(model, stats.thresholds(RATIO), where)
    return running("eager", {"plain": model, "forged": forged, "where by hand": wrapped}, x)


def compiled(model: nn.Module, forged: nn.Module, stats: forged_fx.Stats, x: Tensor) -> Variants:
    thresholds = stats.thresholds(RATIO)
    modules = {
        "plain": torch.compile(model),
        "forged": torch.compile(forged, backend="forged"),
        "where by hand": torch.compile(by_hand(model, thresholds, where)),
        "opaque op": torch.compile(by_hand(model, thresholds, opaque)),
    }
    return running("compiled", modules, x)


def frozen(model: nn.Module, forged: nn.Module, stats: forged_fx.Stats, x: Tensor) -> Variants:
    how = {"options": {"freezing": True}}
    modules = {
        "plain": torch.compile(copy.deepcopy(model), **how),
        "forged": torch.compile(copy.deepcopy(forged), backend="forged", **how),
    }
    return running("frozen", modules, x)


def running(mode: str, modules: dict[str, Callable], x: Tensor) -> Variants:
    return {(mode, variant): functools.partial(module, x) for variant, module in modules.items()}


def calibration(model: nn.Module, forged: nn.Module, stats: forged_fx.Stats, x: Tensor) -> Variants:
    batches = [x] * 4

    def forward() -> None:
        for batch in batches:
            model(batch)

    observer = Observer(model, lambda sighting: None)

    def watch() -> None:
        for batch in batches:
            observer.run(batch)

    return {
        ("calibration", "plain"): forward,
        ("calibration", "watching alone"): watch,
        ("calibration", "calibrate"): functools.partial(forged_fx.calibrate, model, batches),
    }


def cpu_seconds() -> np.ndarray:
    """In all, of this process, and of those that it started and waited for."""
    user, system, compilers_user, compilers_system, _ = os.times()
    python, compilers = user + system, compilers_user + compilers_system
    return np.array([python + compilers, python, compilers])


def compile_time(model: nn.Module, forged: nn.Module, x: Tensor, rounds: int) -> dict[tuple[str, str], np.ndarray]:
    """CPU seconds of the first call, from empty caches: all, this process's, and the compilers' that it starts."""
    from torch._inductor.utils import fresh_cache

    ways = {"plain": (model, {}), "forged": (forged, {"backend": "forged"})}
    torch.compile(nn.Linear(1, 1))(torch.ones(1, 1))  # imports, and a look at what the CPU can do, count for neither
    seconds: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, (module, how) in list(ways.items())[:: -1 if i % 2 else 1]:
            torch._dynamo.reset()
            gc.collect()  # what the last one left would be collected, and counted, in this one
            with fresh_cache():
                began = cpu_seconds()
                torch.compile(module, **how)(x)
                seconds[name].append(cpu_seconds() - began)
    parts = ("compile-time", "of it Python", "of it C++")
    # (the first round imports, and fills tables, for all)
    return {(part, name): np.array(seconds[name])[1:, i] for i, part in enumerate(parts) for name in ways}


TIMED = {"eager": eager, "compiled": compiled, "frozen": frozen, "calibration": calibration}
WHAT = (*TIMED, "compile-time")
PLACEMENTS = 5


def place(modules: list[nn.Module], blocks: list[Tensor]) -> None:
    """Put weights elsewhere, each module's; blocks: memory that is taken, so that results will lie elsewhere, too."""
    blocks += (torch.empty(random.randrange(2**18), dtype=torch.uint8) for _ in range(64))
    weights = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    for t, moved in [(t, t.data.clone()) for t in weights.values()]:  # no place is free before all have moved
        t.data = moved


def timed(variants: Variants, modules: list[nn.Module], rounds: int) -> dict[tuple[str, str], np.ndarray]:
    """CPU seconds in each round, with one thread; else by the clock."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    modules = modules + [run.func for run in variants.values() if isinstance(getattr(run, "func", None), nn.Module)]
    blocks: list[Tensor] = []
    parts = []
    for _ in range(PLACEMENTS):
        place(modules, blocks)
        parts.append(interleave(variants, math.ceil(rounds / PLACEMENTS), clock=clock))
    return {key: np.concatenate([part[key] for part in parts]) for key in variants}


def measure(
    name: str, batch: int, dtype: str, what: list[str], rounds: int, only_ours: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows for one model: each variant as a share of the plain one in the same rounds. In a row that misses its aim
    `differences` says where the time goes."""
    torch._dynamo.reset()
    model, shape = load(name)
    model = model.to(DTYPES[dtype])
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, RATIO)
    seconds: dict[tuple[str, str], np.ndarray] = {}
    runs: Variants = {}
    with torch.no_grad():
        for key in what:
            if key in TIMED:
                variants = TIMED[key](model, forged, stats, x)
                if only_ours:
                    variants = {who: run for who, run in variants.items() if who[1] not in BY_HAND}
                seconds |= timed(variants, [model, forged], rounds)
                runs |= variants
            else:
                seconds |= compile_time(model, forged, x, max(2, rounds // 5))
        for (mode, variant), taken in seconds.items():
            median, low, high = relative(seconds[mode, "plain"], taken)
            missed = median < max(filter(None, AIMS.get((mode, variant), NO_AIM)), default=0)
            known = missed and (mode, variant) in runs
            differences = where_time_goes.differences(runs[mode, "plain"], runs[mode, variant]) if known else []
            yield {
                "model": name, "batch": batch, "dtype": dtype, "mode": mode, "variant": variant,
                "ms": 1e3 * taken.min(), "ratio": median, "low": low, "high": high, "rounds": len(taken),
                "differences": differences,
            }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> str:
    """Over all models, batches and dtypes: the geometric mean of each variant's ratios, the worst, and the aims."""
    lines = []
    for mode, variant in dict.fromkeys((r["mode"], r["variant"]) for r in rows if r["variant"] != "plain"):
        these = [r for r in rows if (r["mode"], r["variant"]) == (mode, variant)]
        worst = min(these, key=lambda row: row["ratio"])
        mean = float(np.exp(np.mean([np.log(row["ratio"]) for row in these])))
        at = f"{worst['model']}, batch {worst['batch']}, {worst['dtype']}"
        for_mean, for_each = AIMS.get((mode, variant), NO_AIM)
        figures = f"geometric mean {held(mean, for_mean)}, worst {held(worst['ratio'], for_each)} ({at})"
        lines.append(f"{mode:12} {variant:14} {figures}")
    return "\n".join(lines)


def held(ratio: float, aim: float | None) -> str:
    """The ratio, and the aim that it is held against."""
    return f"{ratio:.3f}" + ("" if aim is None else f" (aim {aim:.3f}, {'met' if ratio >= aim else 'MISSED'})")


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", default=MODELS, type=model_name, metavar="MODEL", help="see benchmarks/models.py"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help="default: all")
    parser.add_argument("--only-ours", action="store_true", help="without the rows of what people write by hand")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--csv", type=csv_file, default=Path(__file__).with_suffix(".csv"), help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    torch.set_num_threads(args.threads)
    on = {"threads": args.threads, **taken_on("cpu")}
    print(
        f"{on['device']}, {args.threads} threads, torch {torch.__version__}, {args.rounds} rounds in turn, "
        f"weights at {PLACEMENTS} places"
    )
    print("ms: the fastest round; ratio: throughput as a share of the plain model's, median and quartiles")
    rows = []
    for name in args.models:
        for batch in args.batch:
            for dtype in args.dtype:
                for row in measure(name, batch, dtype, args.what, args.rounds, args.only_ours):
                    rows.append(row)
                    label = f"{name:34} batch {batch:<3} {dtype:9} {row['mode']:12} {row['variant']:14}"
                    spread = f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
                    print(f"{label} {row['ms']:10.3f} ms  {spread}", flush=True)
                    if differences := row.pop("differences"):
                        print(where_time_goes.text(differences), flush=True)
                    append(args.csv, row | on)
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
