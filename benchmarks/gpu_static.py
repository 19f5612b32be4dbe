"""What a GPU would launch for plain and forged models, read off the code that Inductor generates, without a GPU.

    python benchmarks/gpu_static.py            every model, fp16; rows that the CSV file has are shown as they are,
                                               and taken anew by --again: the last one of a kind counts
    python benchmarks/gpu_static.py timm:vit_small_patch16_224 --dtypes float16 bfloat16 --modes default max-autotune

Three variants of each model: plain, forged with the threshold written out as `torch.where`, forged with
backend="forged"; in eval mode, channels_last, on an H100 that is not there (see fake_gpu.py). launches: kernels that
Inductor generates and library calls. MB: what they read and write, every buffer once per kernel, as if there were no
cache; a share of bytes is not a share of time.

The extra of backend="forged" is split by cause, by the rules of `forged_fx.cost`: the network's input, residual streams
(the raw value is read too), attention's output, what remains. `left` is what the rules do not explain: it should be 0.
"but for the input" leaves the threshold on the network's input out, which no kernel of the network makes; `AIMS` are
held against that.

max-autotune: for each matrix product Inductor times its own templates and the library on the GPU. Here there is nothing
to time on, so the row shows what is launched where its own template wins.
"""

import argparse
import copy
import csv
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from csv_rows import append, csv_file, taken_on
from models import load, model_name
from torch import Tensor, nn

MODELS = {  # name -> batch
    "preact:28-10": 256,
    "torchvision:resnet50": 32,
    "timm:convnext_tiny": 32,
    "timm:vit_small_patch16_224": 32,
    "timm:swin_tiny_patch4_window7_224": 32,
}
DTYPES = ("float16", "bfloat16", "float32")
MODES = ("default", "max-autotune")
# name -> the extra bytes aimed at in each mode, the network's input aside; of launches, none
AIMS = {
    "preact:28-10": (0.005, 0.005),
    "torchvision:resnet50": (0.08, 0.03),
    "timm:convnext_tiny": (0.01, 0.01),
    "timm:vit_small_patch16_224": (0.05, 0.01),
    "timm:swin_tiny_patch4_window7_224": (0.01, 0.01),
}
CAUSES = ("input", "residual", "attention", "other")
KEYS = ("model", "dtype", "mode", "batch", "architecture", "torch", "only")
FIGURES = (
    "sites", "plain_launches", "plain_mb", "where_launches", "where_mb", "launches", "mb", "extra_launches", "extra",
    "but_for_input_launches", "but_for_input", *(f"{cause}_launches" for cause in CAUSES), *CAUSES, "left",
)  # fmt: skip


def by_where(x: Tensor, t: Tensor) -> Tensor:
    return torch.where(x.abs() < t, 0, x)


def with_where(forged: nn.Module) -> nn.Module:
    """The same sites, each with its threshold written out in PyTorch's own operations."""
    forged = copy.deepcopy(forged)
    for node in forged.graph.find_nodes(op="call_function", target=torch.ops.forged_fx.threshold.default):
        node.target = by_where
    forged.recompile()
    return forged


def measure(name: str, batch: int, dtype: str, mode: str, architecture: str, only: str | None) -> dict:
    import fake_gpu

    import forged_fx
    from forged_fx import backend
    from forged_fx.cost import FREE, LAUNCH, price
    from forged_fx.share import thresholds_in

    model, shape = load(name)
    stats = forged_fx.calibrate(model, [torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))])
    forged = forged_fx.transform(model, stats, only=only)
    sites = sum(row.left_out is None for row in forged_fx.describe(forged))
    fake_gpu.install(architecture)
    x = torch.zeros(batch, *shape, dtype=getattr(torch, dtype)).contiguous(memory_format=torch.channels_last)
    costs: list = []

    def offer(graph: torch.fx.Graph) -> None:
        """The last of the backend's passes (torch 2.11 and 2.12 take no further one), and what the rules say then."""
        offer_as_ever(graph)
        costs[:] = [price(node) for node in thresholds_in(graph)]

    offer_as_ever = backend.offer

    def run(module: nn.Module, by: str) -> tuple[int, float]:
        module = module.to(x.dtype)
        for value in (*module.parameters(), *module.buffers()):
            if value.dim() == 4:
                value.data = value.data.contiguous(memory_format=torch.channels_last)
        kernels = fake_gpu.kernels(module, x, backend=by, options={"max_autotune": mode == "max-autotune"})
        return len(kernels), sum(kernel.bytes for kernel in kernels) / 1e6

    plain, plain_mb = run(model, "inductor")
    is_graph = isinstance(forged, torch.fx.GraphModule)  # (else there are no nodes to write out)
    where, where_mb = run(with_where(forged), "inductor") if is_graph else (math.nan, math.nan)
    with mock.patch.object(backend, "offer", offer):
        ours, mb = run(forged, "forged")
    launches, bytes_by = Counter(), Counter()
    for cost in costs:
        if cost.kind != FREE and not (mode == "max-autotune" and cost.prologue):
            by_source = [
                c for c, text in (("input", "network's input"), ("attention", "attention")) if text in cost.why
            ]
            cause = by_source[0] if by_source else "other" if cost.kind == LAUNCH else "residual"
            launches[cause] += cost.kind == LAUNCH
            bytes_by[cause] += cost.bytes / 1e6
    extra = mb - plain_mb
    return {
        "sites": sites, "plain_launches": plain, "plain_mb": plain_mb, "where_launches": where, "where_mb": where_mb,
        "launches": ours, "mb": mb, "extra_launches": ours - plain, "extra": extra / plain_mb,
        "but_for_input_launches": ours - plain - launches["input"],
        "but_for_input": (extra - bytes_by["input"]) / plain_mb,
        **{f"{cause}_launches": launches[cause] for cause in CAUSES},
        **{cause: bytes_by[cause] / plain_mb for cause in CAUSES},
        "left": (extra - sum(bytes_by.values())) / plain_mb,
    }  # fmt: skip


def library() -> str:
    """Which code of the library's this is."""
    from forged_fx import backend

    return backend._version().hex()[:12]


def rows(path: Path) -> dict[tuple, dict]:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {tuple(row[key] for key in KEYS): row for row in csv.DictReader(file)}


def show(row: dict) -> None:
    f = {key: float(row[key]) for key in FIGURES}
    print(
        f"{row['model']:34} {row['dtype']:8} {row['mode']:12} {row['only'] or 'all':5}{f['sites']:5.0f} sites   "
        f"plain {f['plain_launches']:4.0f}, {f['plain_mb']:6.0f} MB   "
        f"where {f['where_launches'] - f['plain_launches']:+4.0f}, {f['where_mb'] / f['plain_mb'] - 1:+7.2%}   "
        f"ours {f['extra_launches']:+4.0f}, {f['extra']:+7.2%}   "
        f"but for the input {f['but_for_input_launches']:+4.0f}, {f['but_for_input']:+7.2%}   "
        + "  ".join(f"{cause} {f[cause + '_launches']:+.0f} {f[cause]:+.2%}" for cause in CAUSES if f[cause])
        + f"  left {f['left']:+.2%}"
        + beside_aim(row)
        + beside_version(row),
        flush=True,
    )


def beside_aim(row: dict) -> str:
    """Whether the row holds what is aimed at; nothing for a model without an aim."""
    if row["model"] not in AIMS:
        return ""
    most = AIMS[row["model"]][MODES.index(row["mode"])]
    met = float(row["but_for_input_launches"]) <= 0 and float(row["but_for_input"]) <= most
    said = "met" if met else "MISSED (why: docs/cost.md; --only free forges what costs nothing)"
    return f"   aim +0, {most:.1%}: {said}"


def beside_version(row: dict) -> str:
    """Whether other code than today's made the row."""
    if row.get("library") == library():
        return ""
    return f"   by another version of forged_fx ({row.get('date') or 'undated'}): --again takes it anew"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", type=model_name, metavar="MODEL", help="see benchmarks/models.py (default: the five)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float16"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["default"])
    parser.add_argument("--batch", type=int, help="default: 32, for preact:28-10 256")
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--only", choices=["free"], help="forge these sites only, as in forged_fx.transform")
    parser.add_argument("--again", action="store_true", help="take rows anew that the CSV file has")
    parser.add_argument("--csv", type=csv_file, default=Path(__file__).with_suffix(".csv"), help="default: %(default)s")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process: a child's call
    args = parser.parse_args(argv)
    for name in args.models or MODELS:
        for dtype in args.dtypes:
            for mode in args.modes:
                batch = args.batch or MODELS.get(name, 32)
                values = (name, dtype, mode, str(batch), args.architecture, torch.__version__, args.only or "")
                if not args.here and (args.again or values not in rows(args.csv)):
                    # Each in a process of its own: what fake_gpu replaces stays replaced, and memory grows.
                    what = ["--dtypes", dtype, "--modes", mode, "--batch", str(batch)]
                    what += ["--architecture", args.architecture, "--csv", str(args.csv), "--here"]
                    what += ["--only", args.only] if args.only else []
                    if subprocess.run([sys.executable, __file__, name, *what]).returncode:
                        print(f"{name}, {dtype}, {mode}: failed", file=sys.stderr)
                    continue
                if args.here:
                    figures = measure(name, batch, dtype, mode, args.architecture, args.only)
                    by = {"library": library()} | {key: taken_on("cpu")[key] for key in ("triton", "date")}
                    row = dict(zip(KEYS, values, strict=True)) | figures | by
                    append(args.csv, row)
                else:
                    row = rows(args.csv)[values]
                show(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
