"""How many models, and how many of their sites, can be forged, and whether the result is right.

    python benchmarks/coverage.py                      all models; resumes where an earlier run stopped
    python benchmarks/coverage.py --shard 0/2          every second model
    python benchmarks/coverage.py --only 'timm:vit*'   some

Each row says for one model: the sites that calibration saw and the kernels that an independent oracle saw
(`dispatch_oracle.py`), whether their maxima agree, how many sites were rewritten or left out and why, how the model was
captured, whether the result at ratio 0 is the model bit for bit, whether its forward at ratio 2^-6 is the oracle's bit
for bit, and not the plain model's, and its (straight-through) gradient to the input the oracle's (to its embedding,
where the input is tokens), and whether all keys of the state_dict are kept. `compiled` says in how many graphs of
Dynamo's the backend forged the same sites of the plain model, if the result is the same (the graphs are run as they
are, without Inductor).
"""

import argparse
import csv
import inspect
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).parent))
import coverage_models
from csv_rows import append
from dispatch_oracle import DispatchOracle

import forged_fx
from forged_fx import torch_internals
from forged_fx.modes import fast_path_off
from forged_fx.transform import forging_of

RATIO = 2**-6
SECONDS = 600  # a model that takes longer counts as failed


@dataclass
class Row:
    model: str
    sites: int = 0  # that calibration saw and that are not left out by rule
    oracle_sites: int = 0
    maxima_agree: bool = False
    rewritten: int = 0
    left_out: str = ""  # reason (count), by rule
    captured: str = ""
    exact_at_0: bool = False
    equals_oracle: bool = False
    gradient: str = ""
    keys_kept: bool = False
    compiled: str = ""
    seconds: float = 0.0
    error: str = ""

    @property
    def whole(self) -> bool:
        """Every site rewritten or left out by rule, and the result right."""
        right = self.maxima_agree and self.exact_at_0 and self.equals_oracle and self.keys_kept
        return right and self.rewritten == self.sites and not self.error


def check(name: str) -> Row:
    row, start = Row(name), time.perf_counter()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        _check(row, *coverage_models.build(name))
    except Exception as error:
        row.error = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    finally:
        signal.alarm(0)
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def _check(row: Row, model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    keys = model.state_dict().keys()
    # The scan takes a batch as a data loader gives it; models with several inputs take keyword arguments.
    batch = dict(zip(_parameters(model), args, strict=False)) | kwargs if len(args) > 1 or kwargs else (args[0],)
    stats = forged_fx.calibrate(model, [batch])
    found = {site: s for site, s in stats.sites.items() if s.left_out is None}
    row.sites = len(found)
    row.left_out = "; ".join(
        f"{why} ({n})" for why, n in Counter(s.left_out for s in stats.sites.values() if s.left_out).items()
    )

    with torch.no_grad(), fast_path_off():
        measured = DispatchOracle()
        measured.run(model, args, kwargs)
    row.oracle_sites = len(measured.maxima)
    row.maxima_agree = [s.c_max for s in found.values()] == measured.maxima

    forged = forged_fx.transform(model, stats, RATIO)
    row.rewritten = sum(r.left_out is None for r in forged_fx.describe(forged))
    record = forging_of(forged)
    row.captured = (
        "whole"
        if record.not_whole is None
        else f"{len(set(record.reached.values()))} modules: {record.not_whole}"[:200]
    )
    row.keys_kept = keys <= forged.state_dict().keys()

    with torch.no_grad(), fast_path_off():
        plain = _seeded(lambda: model(*args, **kwargs))
        expected = _seeded(lambda: DispatchOracle(RATIO, measured.maxima).run(model, args, kwargs))
        row.equals_oracle = _same(_seeded(lambda: forged(*args, **kwargs)), expected) and not _same(plain, expected)
        forged_fx.set_ratio(forged, 0)
        row.exact_at_0 = _same(_seeded(lambda: forged(*args, **kwargs)), plain)
    forged_fx.set_ratio(forged, RATIO)
    row.gradient = _gradients_agree(model, forged, args, kwargs, measured.maxima)
    row.compiled = _compiled(model, stats, forged, args, kwargs)


def _compiled(
    model: torch.nn.Module, stats: forged_fx.Stats, forged: torch.nn.Module, args: tuple, kwargs: dict
) -> str:
    """The backend's part alone: Dynamo's graphs of the plain model with thresholds, run without Inductor."""
    torch._dynamo.reset()
    graphs = []

    def as_it_is(gm: torch.fx.GraphModule, inputs: list, **_: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    options = {"stats": stats, "ratio": RATIO}
    try:
        with torch.no_grad(), fast_path_off(), mock.patch.object(torch_internals.inductor(), "compile_fx", as_it_is):
            found = _seeded(lambda: torch.compile(model, backend="forged", options=options)(*args, **kwargs))
            expected = _seeded(lambda: forged(*args, **kwargs))
    except TimeoutError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    verdict = "equal" if _same(found, expected) else f"within {_distance(found, expected):.1g}"
    return f"{verdict}, {len(graphs)} graphs"


def _distance(a: Any, b: Any) -> float:
    """The largest difference, as a share of the largest value."""
    pairs = [(x.double(), y.double()) for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True) if _is_float(x)]
    return max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)


def _gradients_agree(model: torch.nn.Module, forged: torch.nn.Module, args: tuple, kwargs: dict, maxima: list) -> str:
    """The oracle works below autograd, so that its gradient is the straight-through one."""
    expected = _gradient(lambda a, k: DispatchOracle(RATIO, maxima).run(model, a, k), model, args, kwargs)
    found = _gradient(lambda a, k: forged(*a, **k), forged, args, kwargs)
    if not expected:
        return "none: no output that depends on an input differentiably"
    pairs = zip(expected, found, strict=True)
    return (
        "equal"
        if all(torch.allclose(b, a, rtol=1e-3, atol=1e-5 * a.abs().max().item()) for a, b in pairs)
        else "differs"
    )


def _gradient(run: Any, model: torch.nn.Module, args: tuple, kwargs: dict) -> list[Tensor]:
    args, kwargs = tree_map(lambda v: v.clone().requires_grad_() if _is_float(v) else v, (args, kwargs))
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if _is_float(leaf)]

    def embedded(module: torch.nn.Module, args: tuple, result: Tensor) -> Tensor:
        leaves.append(result.detach().requires_grad_())
        return leaves[-1]

    tables = [] if leaves else [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    handles = [module.register_forward_hook(embedded) for module in tables]
    with fast_path_off(), forged_fx.straight_through():
        outputs = [o for o in tree_leaves(_seeded(lambda: run(args, kwargs))) if _is_float(o) and o.requires_grad]
    for handle in handles:
        handle.remove()
    if not outputs or not leaves:
        return []
    total = sum(output.square().mean() for output in outputs)
    return [g for g in torch.autograd.grad(total, leaves, allow_unused=True) if g is not None]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _parameters(model: torch.nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _seeded(run: Any) -> Any:
    torch.manual_seed(0)
    return run()


def _same(a: Any, b: Any) -> bool:
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs if _is_float(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th model, from the i-th")
    parser.add_argument("--only", default="*", help="a glob over model names")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    done = _read(options.out)
    shard, of = map(int, options.shard.split("/"))
    todo = [n for n in coverage_models.names()[shard::of] if n not in done and fnmatchcase(n, options.only)]
    for i, name in enumerate(todo):
        row = check(name)
        append(options.out, asdict(row))
        verdict = "ok" if row.whole else "NOT WHOLE"
        print(f"[{i + 1}/{len(todo)}] {verdict:9} {asdict(row)}", flush=True)
    print(summary(_read(options.out).values()))


def summary(rows: Any) -> str:
    rows = list(rows)
    whole, sites = sum(row.whole for row in rows), sum(row.sites for row in rows)
    rewritten = sum(row.rewritten for row in rows)
    calibrated = sum(row.sites > 0 for row in rows)
    forged, exact = sum(row.rewritten > 0 for row in rows), sum(row.exact_at_0 for row in rows)
    return (
        f"calibrated {calibrated} of {len(rows)}, exact at ratio 0 {exact} of {forged}\n"
        f"models {whole} of {len(rows)}, sites {rewritten} of {sites}"
    )


def _read(path: Path) -> dict[str, Row]:
    if not path.exists():
        return {}
    kinds = {field.name: field.type for field in fields(Row)}
    convert = {bool: lambda v: v == "True", int: int, float: float, str: str}
    with open(path, newline="") as file:
        rows = [Row(**{k: convert[kinds[k]](v) for k, v in line.items()}) for line in csv.DictReader(file)]
    return {row.model: row for row in rows}


if __name__ == "__main__":
    main()
