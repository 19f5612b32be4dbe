"""What needs a GPU, in one command and under 5 minutes: tables, and rows in two CSV files.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --models timm:convnext_tiny timm:swin_tiny_patch4_window7_224 --budget 1200

What has to be compiled is compiled first, in processes of their own, as many at once as --ahead says: the process that
measures finds it in the caches of Inductor and Triton, which all of them share on disk. It alone chooses what runs:
what a busy GPU says of two kernels or two block sizes is thrown away.

1. Every kernel beside its specification (kernels/reference.py), on the device. differ: elements that are not equal;
   decide: that one zeroes and the other does not; error: the largest difference, as a share of the largest value that
   is computed, in the dtype's epsilons. More than 8, or more decisions than one in 100,000, is WRONG.
2. Every kernel's time: median and quartiles, the cache flushed ahead of each run; the bytes that it has to move, per
   second, as a share of what a copy reaches in the same run; and how often faster it is than the same chain by
   PyTorch's operators, one by one.
3. Models, plain and forged, in turn: throughput forged / plain, median and quartiles; and by the profiler, how many
   kernels a forward pass of each launches, and how long they take: loops are the kernels that Inductor generates but
   for products, where thresholds ride; the others are products, attention and copies. "eager, unfused" is the forged
   model with a kernel for each threshold alone; "only free" the model with no other thresholds than those that
   forged_fx.cost calls free; neither is run unless asked for. Below a row: the kernels that take longer, as Inductor
   calls them, the threshold and the number left out, so that plain and forged ones have one name.

What is not through when --budget ends is cut off, and listed; kernels leave half of it to the models. What fails is a
row that says how, and the others are measured all the same. The exit status is 1 where a row is WRONG or failed.

Without a GPU it says so, and that is all. A rehearsal of every step, whose times mean nothing (in float16: Triton's
interpreter truncates bfloat16 where a GPU rounds, so that some of its rows in bfloat16 are WRONG):
    TRITON_INTERPRET=1 python benchmarks/gpu.py --device cpu --dtype float16 --models digits --modes eager compiled
"""

import argparse
import csv
import functools
import itertools
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from ahead import Job, ahead
from csv_rows import taken_on, written
from kernel_cases import DTYPES, Case, cases
from models import load
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

import forged_fx
from forged_fx.checked import in_a_line
from forged_fx.thresholds import thresholds_of
from forged_fx.throughput import interleave, relative
from forged_fx.transform import forging_of

COPY_BYTES = 2**28  # of the tensor whose copy is timed: more than any cache holds
MODELS = ("torchvision:resnet50", "preact:28-10", "timm:vit_small_patch16_224")
BACKENDS = {"plain": "inductor", "forged": "forged"}
LOOPS = ("triton_poi", "triton_red", "triton_per")  # how Inductor calls a kernel that is no product
AHEAD_SHARE, KERNELS_SHARE = 0.35, 0.5  # of the budget, when compiling ahead and, where models follow, kernels end
LATE = "no time left in --budget"


# ---- rows


class Late(BaseException):
    """The time is up. Not an Exception: nobody shall take it for a failure, and try the next thing."""


@contextmanager
def until(ends: float) -> Iterator[None]:
    """Raises Late where what runs within is not through by then. Compiling is waited for in Python, so it is cut off
    too; a call into C is let through first."""

    def late(*_: Any) -> None:
        raise Late

    if (left := ends - time.monotonic()) <= 0:
        raise Late
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(measure: Callable[[], dict[str, Any]], ends: float) -> dict[str, Any]:
    """What `measure` returns, or why there is nothing: the other rows' figures are kept."""
    try:
        with until(ends):
            return measure()
    except Late:
        return {"left_out": LATE}
    except Exception as error:
        return {"left_out": in_a_line(error)}


# ---- kernels


@dataclass(frozen=True)
class KernelRow:
    """us, low, high: microseconds, median and quartiles. share: of the bandwidth of a copy. gain: the chain's time over
    the kernel's. left_out: why there is no figure."""

    kernel: str
    dtype: str
    differ: float = math.nan
    decide: float = math.nan
    error: float = math.nan
    verdict: str = ""
    us: float = math.nan
    low: float = math.nan
    high: float = math.nan
    share: float = math.nan
    gain: float = math.nan
    left_out: str = ""

    def __str__(self) -> str:
        return f"{self.kernel} ({self.dtype})"


def filled(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The case's tensors with random values. The threshold drops about a third of them; a quarter pass the limit."""
    generator = torch.Generator(device).manual_seed(0)
    given = case.make(dtype, device)
    for name, tensor in given.items():
        tensor.normal_(generator=generator)
        if name in ("var", "width"):
            tensor.abs_().add_(0.5)
        if name in ("t", "limit"):
            tensor.fill_({"t": 0.4, "limit": 1.2}[name])
    return given


def check(case: Case, given: dict[str, Tensor]) -> tuple[int, int, float, str]:
    """differ, decide, error, verdict: see the head of this file."""
    pairs = list(zip(*(_results(f(**given)) for f in (case.launch, case.reference)), strict=True))
    # The largest value that was computed: an end that limits it does not make the arithmetic ahead of it more exact.
    open_ends = {name: torch.full_like(given[name], math.inf) for name in ("t", "limit") if name in given}
    computed = max(v.abs().max().double() for v in _results(case.reference(**{**given, **open_ends})))
    differ = sum((found != expected).sum().item() for found, expected in pairs)
    decide = sum(((found == 0) != (expected == 0)).sum().item() for found, expected in pairs[:1])
    error = 0.0
    for found, expected in pairs:
        same = (found == 0) == (expected == 0)
        largest = max(expected.abs().max().double(), computed) * torch.finfo(found.dtype).eps
        error = max(error, ((found.double() - expected.double())[same].abs().max() / largest).item())
    same_layout = all(found.stride() == expected.stride() for found, expected in pairs)
    right = same_layout and error <= 8 and decide <= given["x"].numel() / 1e5
    return differ, decide, error, "ok" if right else "WRONG"


def _results(result: Any) -> list[Tensor]:
    """What a launcher, or the reference, returns: a tensor, or two of which the second may be None."""
    return [v for v in (result if isinstance(result, tuple) else (result,)) if v is not None]


def seconds(call: Callable[[], Any], device: str) -> tuple[float, float, float]:
    """Median and quartiles of one call's time."""
    if device == "cuda":
        from triton.testing import do_bench

        low, median, high = (t / 1e3 for t in do_bench(call, quantiles=[0.25, 0.5, 0.75], warmup=10, rep=40))
        return median, low, high
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return sorted(times)[1], min(times), max(times)


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written."""
    x = torch.empty(COPY_BYTES if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds(lambda: y.copy_(x), device)[0]


def measure_kernel(case: Case, dtype: torch.dtype, device: str, bandwidth: float) -> dict[str, Any]:
    given = filled(case, dtype, device)
    results = _results(case.launch(**given))
    whole = [v for v in (*given.values(), *results) if v.numel() == given["x"].numel()]
    least = sum(v.numel() * v.element_size() for v in whole)
    checked = dict(zip(("differ", "decide", "error", "verdict"), check(case, given), strict=True))
    with torch.no_grad():
        median, low, high = seconds(functools.partial(case.launch, **given), device)
        chain, *_ = seconds(functools.partial(case.chain, **given), device)
    times = {"us": 1e6 * median, "low": 1e6 * low, "high": 1e6 * high}
    return {**checked, **times, "share": least / median / bandwidth, "gain": chain / median}


def chosen_cases(args: argparse.Namespace) -> dict[str, Case]:
    shapes = cases(args.batch) if args.device == "cuda" else cases(1, side=4, length=3)
    return {name: case for name, case in shapes.items() if args.only in name}


def kernel_rows(args: argparse.Namespace, bandwidth: float, ends: float) -> Iterator[KernelRow]:
    for name, case in chosen_cases(args).items():
        for key in args.dtype:
            measure = functools.partial(measure_kernel, case, DTYPES[key], args.device, bandwidth)
            yield KernelRow(name, key, **attempt(measure, ends))


# ---- models


@dataclass(frozen=True)
class Mode:
    """mode: torch.compile's, None for eager. fuse, only: as in forged_fx.transform."""

    mode: str | None
    fuse: bool
    only: str | None = None


MODES = {  # those that take least first, so that what has no time left is what takes most
    "eager": Mode(None, True),
    "eager, unfused": Mode(None, False),
    "compiled": Mode("default", False),
    "reduce-overhead": Mode("reduce-overhead", False),
    "max-autotune": Mode("max-autotune", False),
    "compiled, only free": Mode("default", False, "free"),
    "max-autotune, only free": Mode("max-autotune", False, "free"),
}
USUAL = ("eager", "compiled", "reduce-overhead", "max-autotune")


@dataclass(frozen=True)
class ModelRow:
    """plain_ms, forged_ms: the fastest round. ratio, low, high: throughput forged / plain, median and quartiles.
    launches: kernels in a forward pass of the plain model; more: what the forged one launches beyond them; not a number
    where the profiler saw none. loops, forged_loops: ms that Inductor's loops take in a pass of each; others,
    forged_others: that all other kernels take. sites: how many are forged. fused: how many of the thresholds run in an
    eager kernel with their producer. left_out: why there is no figure. slower: see the head of this file."""

    model: str
    dtype: str
    mode: str
    batch: int
    plain_ms: float = math.nan
    forged_ms: float = math.nan
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    launches: float = math.nan
    more: float = math.nan
    loops: float = math.nan
    forged_loops: float = math.nan
    others: float = math.nan
    forged_others: float = math.nan
    sites: float = math.nan
    fused: float = math.nan
    left_out: str = ""
    slower: str = ""

    def __str__(self) -> str:
        return f"{self.model} ({self.dtype}, {self.mode})"


@functools.cache
def plain(name: str, dtype: torch.dtype, device: str, batch: int) -> tuple[torch.nn.Module, Tensor]:
    """The model, and its input."""
    model, shape = load(name)
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0))
    return tuple(v.to(device, dtype, memory_format=torch.channels_last) for v in (model, x))  # type: ignore[return-value]


@functools.cache
def statistics(*what: Any) -> forged_fx.Stats:
    model, x = plain(*what)
    return forged_fx.calibrate(model, [x])


def variant(
    which: str, name: str, dtype: torch.dtype, mode: Mode, args: argparse.Namespace
) -> tuple[torch.nn.Module, Callable[[], Any]]:
    """ "plain" or "forged": the model, and a forward pass, which compiles it first."""
    what = name, dtype, args.device, args.batch
    model, x = plain(*what)
    if which == "forged":
        model = forged_fx.transform(model, statistics(*what), 2**-6, fuse=mode.fuse, only=mode.only)
    if mode.mode is None:
        return model, functools.partial(model, x)
    options = {} if mode.mode == "default" else {"mode": mode.mode}
    return model, functools.partial(torch.compile(model, backend=BACKENDS[which], **options), x)


@contextmanager
def choosing(mode: Mode) -> Iterator[None]:
    """Without gradients, and so that the choices that Inductor measures for are made by this process: of block sizes
    (autotune_local_cache), and under max-autotune of kernels, which the code of a graph in the cache has made already.
    """
    contests = mode.mode == "max-autotune"
    with torch.no_grad(), inductor.patch(autotune_local_cache=contests, fx_graph_cache=not contests):
        yield


def measure_model(name: str, dtype: torch.dtype, mode: Mode, args: argparse.Namespace) -> dict[str, Any]:
    torch._dynamo.reset()
    found = {which: variant(which, name, dtype, mode, args) for which in BACKENDS}
    with choosing(mode):
        times = interleave(
            {("", which): call for which, (_, call) in found.items()},
            args.runs,
            torch.cuda.synchronize if args.device == "cuda" else lambda: None,
        )
        ran = {which: kernels(call) if args.device == "cuda" else [] for which, (_, call) in found.items()}
    base, ours = times["", "plain"], times["", "forged"]
    median, low, high = relative(base, ours)
    forged, _ = found["forged"]
    return {
        "plain_ms": 1e3 * base.min(),
        "forged_ms": 1e3 * ours.min(),
        "ratio": median,
        "low": low,
        "high": high,
        **profiled(ran["plain"], ran["forged"]),
        "sites": len(thresholds_of(forged)),
        "fused": forging_of(forged).fused or 0,
    }


def kernels(call: Callable[[], Any]) -> list[tuple[str, float]]:
    """The kernels that run on the device in one call: name and milliseconds. Memory that is copied or set is none."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        call()
        torch.cuda.synchronize()
    events = [event for event in watched.events() if event.device_type == DeviceType.CUDA]
    ran = [(event.name, event.time_range.elapsed_us() / 1e3) for event in events]
    return [(name, ms) for name, ms in ran if not name.startswith(("Memcpy", "Memset"))]


def profiled(plain: list[tuple[str, float]], forged: list[tuple[str, float]]) -> dict[str, Any]:
    """A row's figures for the kernels that ran in each; none where the profiler saw none."""
    if not plain or not forged:
        return {}
    loops, others, forged_loops, forged_others = (
        sum(ms for name, ms in ran if name.startswith(LOOPS) is looped)
        for ran in (plain, forged)
        for looped in (True, False)
    )
    times = {"loops": loops, "others": others, "forged_loops": forged_loops, "forged_others": forged_others}
    counts = {"launches": len(plain), "more": len(forged) - len(plain)}
    return {**counts, **times, "slower": "; ".join(slower(by_name(plain), by_name(forged)))}


def by_name(ran: list[tuple[str, float]]) -> dict[str, list[float]]:
    """A kernel's name, but for its number, its threshold and a template's arguments -> the times of each."""
    times: dict[str, list[float]] = {}
    for name, ms in ran:
        times.setdefault(re.sub(r"_threshold|_\d+$|<.*", "", name), []).append(ms)
    return times


def slower(plain: dict[str, list[float]], forged: dict[str, list[float]]) -> list[str]:
    """At most five kernels, the greatest loss first: how long they take, and how many they are."""
    lost = {name: sum(ms) - sum(plain.get(name, [])) for name, ms in forged.items()}
    worst = sorted((name for name in lost if lost[name] > 0), key=lambda name: -lost[name])[:5]
    rows = [(name, plain.get(name, []), forged[name]) for name in worst]
    return [f"{name} {sum(a):.3f} ms ({len(a)}) -> {sum(b):.3f} ms ({len(b)})" for name, a, b in rows]


def dtypes(args: argparse.Namespace) -> list[str]:
    """Of models."""
    return [key for key in args.dtype if key != "float32" or args.dtype == ["float32"]]


def model_rows(args: argparse.Namespace, ends: float) -> Iterator[ModelRow]:
    for mode in (name for name in MODES if name in args.modes):
        for model in args.models:
            for dtype in dtypes(args):
                measure = functools.partial(measure_model, model, DTYPES[dtype], MODES[mode], args)
                yield ModelRow(model, dtype, mode, args.batch, **attempt(measure, ends))


# ---- compiling ahead


def compile_kernels(key: str, args: argparse.Namespace) -> None:
    for case in chosen_cases(args).values():
        check(case, filled(case, DTYPES[key], args.device))


def compile_model(name: str, key: str, which: str, modes: list[Mode], args: argparse.Namespace) -> None:
    for mode in modes:
        torch._dynamo.reset()
        _, call = variant(which, name, DTYPES[key], mode, args)
        with choosing(mode):
            call()


def contests(name: str, key: str, which: str, mode: Mode, args: argparse.Namespace, folder: str) -> None:
    """Compiles what takes part, too; who wins while others use the GPU is forgotten with the folder."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)
    compile_model(name, key, which, [mode], args)


def jobs(args: argparse.Namespace, folder: str) -> Iterator[Job]:
    """What is measured first, first; "max-autotune", which takes longest, last. folder: for what is to be forgotten."""
    modes = [MODES[name] for name in MODES if name in args.modes]
    usual = [mode for mode in modes if mode.mode != "max-autotune"]
    yield from (functools.partial(compile_kernels, key, args) for key in args.dtype)
    whole = [(model, key, which) for model in args.models for key in dtypes(args) for which in BACKENDS]
    yield from (functools.partial(compile_model, *what, usual, args) for what in whole if usual)
    for mode in modes:
        if mode not in usual:
            yield from (functools.partial(contests, *what, mode, args, folder) for what in whole)


# ---- the tables

# in the order printed: how wide, and how a figure is written
KERNEL_COLUMNS = {
    "kernel": ("<34", ""), "dtype": ("<8", ""), "differ": (">8", ".0f"), "decide": (">6", ".0f"),
    "error": (">6", ".2f"), "verdict": ("<7", ""), "us": (">9", ".1f"), "low": (">9", ".1f"), "high": (">9", ".1f"),
    "share": (">6", ".3f"), "gain": (">6", ".2f"), "left_out": ("", ""),
}  # fmt: skip
MODEL_COLUMNS = {
    "model": ("<32", ""), "dtype": ("<8", ""), "mode": ("<23", ""), "batch": (">5", "d"), "plain_ms": (">9", ".3f"),
    "forged_ms": (">9", ".3f"), "ratio": (">6", ".3f"), "low": (">6", ".3f"), "high": (">6", ".3f"),
    "launches": (">8", ".0f"), "more": (">5", ".0f"), "loops": (">7", ".3f"), "forged_loops": (">12", ".3f"),
    "others": (">7", ".3f"), "forged_others": (">13", ".3f"), "sites": (">5", ".0f"), "fused": (">5", ".0f"),
    "left_out": ("", ""),
}  # fmt: skip


def report(
    kind: type, rows: Iterator[Any], columns: dict[str, tuple[str, str]], path: Path, where: dict[str, Any]
) -> list[Any]:
    """Print the rows and write them as they come: what was measured is not lost with what fails later."""
    print(" ".join(f"{key:{width}}" for key, (width, _) in columns.items()))
    done = []
    first = next(rows, None)
    if first is None:  # a table of an earlier run is not lost to an empty one
        print(f"no rows: {path} stays as it is\n")
        return done
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(field.name for field in fields(kind)), *where])
        writer.writeheader()
        for row in itertools.chain([first], rows):
            cells = asdict(row)
            print(" ".join(f"{cells[k]:{width}{form}}" for k, (width, form) in columns.items()).rstrip(), flush=True)
            for kernel in filter(None, cells.get("slower", "").split("; ")):
                print(f"    {kernel}", flush=True)
            writer.writerow(written({**cells, **where}))
            file.flush()
            done.append(row)
    print(f"{len(done)} rows written to {path}\n")
    return done


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), metavar="MODEL", help="see benchmarks/models.py")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of models, float32 if alone")
    parser.add_argument("--only", default="", help="of the kernels, those whose name contains this")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(USUAL))
    parser.add_argument("--batch", type=int, default=128, help="inputs per forward pass (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=280, help="seconds for all of it (default: %(default)s)")
    parser.add_argument(
        "--ahead", type=int, metavar="N", help="processes that compile (default: the cores; on a CPU 0)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--csv", type=Path, default=Path(__file__).parent, help="the folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.ahead is None:
        args.ahead = len(os.sched_getaffinity(0)) if args.device == "cuda" else 0
    if args.ahead < 0:
        parser.error(f"--ahead {args.ahead}: at least 1, or 0 to compile nothing ahead")
    args.dtype = list(dict.fromkeys(args.dtype))
    args.csv.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends, too
    began = time.monotonic()
    ends = began + args.budget
    kernels_end = began + args.budget * (KERNELS_SHARE if args.models else 1)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: this machine has no GPU that PyTorch can use, so there is nothing to time; see --help")
        return 0
    if args.models and "forged" not in torch._dynamo.list_backends():
        sys.exit('gpu.py: PyTorch does not know backend="forged": install this package first, `pip install -e .`')
    where = taken_on(args.device)
    print(f"{where['device']}, torch {where['torch']}, triton {where['triton']}")
    if args.device == "cpu":
        print("a rehearsal on the CPU: the times mean nothing")
    # As Inductor's compiling processes do. On torch 2.11 this one did not: with another assembler it finds nothing of
    # theirs in Triton's cache, and compiles each candidate of a contest anew, one after the other.
    _set_triton_ptxas_path()
    if args.ahead:
        # (one folder, whoever compiles first: Inductor's own is named after it)
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path(cache_dir()) / "triton" / "all"))
        with tempfile.TemporaryDirectory() as folder:
            whole = list(jobs(args, folder))
            left = ahead(whole, args.ahead, began + args.budget * AHEAD_SHARE)
        through = f"{len(whole) - left} of {len(whole)} jobs"
        print(f"compiled ahead: {through} in {time.monotonic() - began:.0f} s, {args.ahead} at once")
    bandwidth = copy_bandwidth(args.device)
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s, read and written; share is of that\n")
    rows = kernel_rows(args, bandwidth, kernels_end)
    done = report(
        KernelRow, rows, KERNEL_COLUMNS, args.csv / "gpu_kernels.csv", {"copy_gb_s": bandwidth / 1e9, **where}
    )
    faults = [f"WRONG: {row}" for row in done if row.verdict == "WRONG"]
    if args.models:
        done += report(
            ModelRow, model_rows(args, ends), MODEL_COLUMNS, args.csv / "gpu_models.csv", {"runs": args.runs, **where}
        )
    faults += [f"FAILED: {row}: {row.left_out}" for row in done if row.left_out not in ("", LATE)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
