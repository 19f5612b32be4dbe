"""The kernels, as machine code for an A100, H100 and B200: a table, and rows in a CSV file. Needs no GPU; nothing runs.

    python benchmarks/kernels_static.py
    python benchmarks/kernels_static.py --arch 90 --dtype float16 --only "batch norm"

A row per kernel, dtype and architecture, and beside it one for what Inductor generates for the same chain. registers:
per thread; shared: bytes per block; load_bits, store_bits: the narrowest access to a whole tensor (not to parameters);
instructions: per element, each counted once, the rare branches of a division among them; bytes: what the accesses move
per element, parameters, which a cache holds, included; least_bytes: each whole tensor once. nan: the code has a loop.
limits: those that are asserted. MISSED: those of them that do not hold; the exit status is then 1.
"""

import argparse
import csv
import importlib.util
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import aot
import torch
import triton
from csv_rows import csv_file
from kernel_cases import DTYPES, cases
from torch import Tensor

CASES = cases()


@dataclass(frozen=True)
class Row:
    kernel: str
    by: str  # "forged_fx" or "Inductor"
    dtype: str
    arch: str
    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int
    instructions: float
    bytes: float
    least_bytes: int
    limits: str  # those that are asserted
    missed: str  # those of them that do not hold


def ours(name: str, dtype: torch.dtype, arch: int) -> Row:
    case = CASES[name]
    given = case.make(dtype, "meta")
    (launch,) = aot.launches(case.module, lambda: case.launch(**given))
    figures = aot.figures(launch.compiled_for(arch))
    whole = [value for value in launch.tensors.values() if value.numel() == given["x"].numel()]
    read = sum(any(value is g for g in given.values()) for value in whole)
    row = _row(
        name, "forged_fx", dtype, arch, figures, launch.num_warps, launch.programs, given["x"].numel(), len(whole), read
    )
    limits = {"0 spills": row.spills == 0, "128 bits": row.store_bits == row.load_bits == 128}
    if case.most is not None:
        limits[f"{case.most} instructions"] = row.instructions <= case.most
    missed = ", ".join(limit for limit, holds in limits.items() if not holds)
    return replace(row, limits=", ".join(limits), missed=missed)


def _row(
    name: str, by: str, dtype: torch.dtype, arch: int, figures: aot.Figures, num_warps: int, programs: int,
    numel: int, whole: int, read: int,
) -> Row:  # fmt: skip
    threads = num_warps * aot.WARP * programs
    moved = sum(bits * count for bits, count in (figures.loads + figures.stores).items()) / 8
    return Row(
        name, by, str(dtype).removeprefix("torch."), f"sm_{arch}", figures.registers, figures.spills, figures.shared,
        _narrowest(figures.loads, read * sum(figures.stores.values()) // max(1, whole - read)), min(figures.stores),
        figures.instructions * threads / numel, moved * threads / numel, whole * dtype.itemsize, "", "",
    )  # fmt: skip


def _narrowest(loads: Counter[int], whole: int) -> int:
    """Of the `whole` widest loads: those of whole tensors. (Machine code does not say which pointer a load follows.)"""
    widest = [bits for bits in sorted(loads, reverse=True) for _ in range(loads[bits])]
    return min(widest[: max(1, whole)])


# ---- what Inductor generates


def inductor(name: str, dtype: torch.dtype, archs: list[int]) -> list[Row]:
    """Its kernels for the same chain, a row for each and each architecture. The code is what it writes for an H100."""
    from fake_gpu import FAKE

    case = CASES[name]
    with FAKE:
        given = case.make(dtype, "cuda")
    code = _generated(lambda *args: case.chain(**dict(zip(given, args, strict=True))), list(given.values()))
    least = ours(name, dtype, archs[0])
    return [replace(row, least_bytes=least.least_bytes) for row in _rows_of(name, dtype, archs, code, given["x"])]


def _rows_of(name: str, dtype: torch.dtype, archs: list[int], code: str, x: Tensor) -> Iterator[Row]:
    for kernel in _kernels_of(code):
        for arch in archs:
            yield _inductor_row(name, dtype, arch, kernel, x)


def _generated(f: Callable, args: list[Tensor]) -> str:
    from fake_gpu import FAKE
    from torch._inductor.graph import GraphLowering

    class Stop(BaseException):
        """The code is written. Not an Exception: nobody shall take it for a failure."""

    found = []

    def stop(self: GraphLowering) -> None:
        found.append(self.codegen()[0].value)
        raise Stop

    torch._dynamo.reset()
    with mock.patch.object(GraphLowering, "compile_to_module", stop), FAKE, torch.no_grad():
        try:
            torch.compile(f, fullgraph=True)(*args)
        except Stop:
            pass
    (code,) = found
    return code


def _kernels_of(code: str) -> Iterator[Any]:
    """The generated kernels: Triton functions, with Inductor's launch configurations around them."""
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL):
        path = Path(tempfile.mkdtemp(prefix="kernels_static_")) / f"{name}.py"  # Triton reads a kernel's source file
        path.write_text(source.replace("triton_helpers.set_driver_to_gpu()", ""))  # there is none
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield getattr(module, name)


def _inductor_row(name: str, dtype: torch.dtype, arch: int, kernel: Any, x: Tensor) -> Row:
    config = kernel.configs[0]  # the first of those that it would time against each other
    meta, names = kernel.triton_meta, kernel.fn.arg_names
    constants = {key: value for key, value in {**meta["constants"], **config.kwargs}.items() if key in names}
    signature = {key: kind for key, kind in meta["signature"].items() if kind != "constexpr" and key not in constants}
    aligned = {names[index] for (index,) in meta["configs"][0]} & signature.keys()
    launch = aot.Launch(kernel.fn, signature, constants, frozenset(aligned), config.num_warps, programs=0, tensors={})
    figures = aot.figures(launch.compiled_for(arch))
    block = math.prod(size for key, size in config.kwargs.items() if key in ("XBLOCK", "YBLOCK", "ZBLOCK"))
    given = CASES[name].make(dtype, "meta")
    rows = x.numel() // given["weight"].numel() if "r0_" in kernel.size_hints else x.numel()
    read = sum(key in ("residual", "grad") for key in given) + 1
    written = sum(key.startswith(("out_ptr", "in_out_ptr")) for key in signature)
    programs = math.ceil(rows / block)
    row = _row(name, "Inductor", dtype, arch, figures, config.num_warps, programs, x.numel(), read + written, read)
    loops = "R0_BLOCK" in config.kwargs  # what is in a loop would be counted once
    return replace(row, instructions=math.nan, bytes=math.nan) if loops else row


# ---- the table

# in the order printed: how wide, and how a figure is written
COLUMNS = {
    "kernel": ("<34", ""), "by": ("<9", ""), "dtype": ("<8", ""), "arch": ("<6", ""), "registers": (">9", "d"),
    "spills": (">6", "d"), "shared": (">6", "d"), "load_bits": (">9", "d"), "store_bits": (">10", "d"),
    "instructions": (">12", ".1f"), "bytes": (">6", ".1f"), "least_bytes": (">11", "d"), "limits": ("", ""),
}  # fmt: skip


def text(row: Row) -> str:
    cells = {**asdict(row), "limits": row.limits + (f"; MISSED {row.missed}" if row.missed else "")}
    return " ".join(f"{cells[key]:{width}{form}}" for key, (width, form) in COLUMNS.items()).rstrip()


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", type=int, choices=aot.ARCHITECTURES, default=list(aot.ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--no-inductor", action="store_true", help="leave out Inductor's rows")
    parser.add_argument("--csv", type=csv_file, default=Path(__file__).with_suffix(".csv"), help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = options(argv)
    print(f"machine code by torch {torch.__version__}, triton {triton.__version__}; nothing here was timed or run")
    print(" ".join(f"{key:{width}}" for key, (width, _) in COLUMNS.items()))
    if not args.no_inductor:
        import fake_gpu

        fake_gpu.install("sm_90")
    rows: list[Row] = []
    for name in (name for name in CASES if args.only in name):
        for dtype in (DTYPES[key] for key in args.dtype):
            new = [ours(name, dtype, arch) for arch in args.arch]
            new += [] if args.no_inductor else inductor(name, dtype, args.arch)
            print(*map(text, new), sep="\n", flush=True)
            rows += new
    if not rows:
        print(f"no kernel's name contains {args.only!r}; there are {', '.join(CASES)}", file=sys.stderr)
        return 2
    with args.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)
    missed = sum(bool(row.missed) for row in rows)
    print(f"{len(rows)} rows written to {args.csv}; asserted limits missed in {missed}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
