"""Every public call, as a caller with a type checker writes it: `mypy` checks it, with the package. It is never run."""

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor, nn

import forged_fx
from forged_fx import Stats
from forged_fx.cost import Cost
from forged_fx.describe import Description
from forged_fx.evaluate import Comparison, Result
from forged_fx.lipschitz import Figure, Lipschitz
from forged_fx.search import Finalist, Search
from forged_fx.sparsity import Sparsity
from forged_fx.sweep import Point, Sweep


def statistics(model: nn.Module, batches: list[tuple[Tensor, Tensor]], folder: Path) -> Stats:
    stats = forged_fx.calibrate(model, batches, max_batches=10, channels=True, checkpoint=folder / "scan")
    assert_type(stats, Stats)
    assert_type(stats.merge(stats), Stats)
    assert_type(stats.thresholds(2**-6), dict[str, float])
    stats.save(folder / "stats.safetensors")
    return Stats.load(folder / "stats.safetensors")


def forged(model: nn.Module, stats: Stats, x: Tensor) -> nn.Module:
    made = forged_fx.transform(model, stats, 2**-6, kind="hard", exclude=["head"], example=((x,), {}))
    assert_type(made, nn.Module)
    forged_fx.transform(model, "stats.safetensors", {"layer1.*": 2**-7, "*": None})
    forged_fx.transform(model, stats, (2**-6, 0.7), kind={"*": "band"}, where="conv1", only="free")
    forged_fx.set_ratio(made, 2**-7)
    assert_type(forged_fx.describe(made), Description)
    assert_type([row.site for row in forged_fx.describe(made, cost=True, example=((x,), {}))], list[str])
    assert_type(forged_fx.cost(made, (x,)), dict[str, Cost])
    with forged_fx.straight_through():
        made(x).sum().backward()
    torch.export.export(made, (x,)).run_decompositions(forged_fx.decompositions())
    return made


def judged(made: nn.Module, model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    result = forged_fx.evaluate(made, model, x=x, y=y, eps=8 / 255, attacks=["apgd-ce"], folder=folder, shard=False)
    assert_type(result, Result)
    assert_type(result.verdict, str)
    assert_type(result.worst_case, float)
    assert_type(result.base_worst_case, float | None)
    assert_type(result.verify(made, x, y, model), int)
    found = forged_fx.compare(folder, result)
    assert_type(found, Comparison)
    print(found)
    return Result.load(folder)


def measured(made: nn.Module, model: nn.Module, x: Tensor) -> None:
    zeroed = forged_fx.sparsity(made, [x])
    assert_type(zeroed, Sparsity)
    assert_type(zeroed.overall.net, float)
    smoothness = forged_fx.lipschitz(model, made, x, eps=8 / 255)
    assert_type(smoothness, Lipschitz)
    assert_type(smoothness[0], Figure)
    smoothness.save("lipschitz.csv")
    zeroed.plot(Path("sparsity.svg"))


def sought(model: nn.Module, stats: Stats, x: Tensor, y: Tensor) -> nn.Module:
    swept = forged_fx.sweep(model, stats, x, y, eps=8 / 255, ratios={"hard": [2**-6], "clamp": [0.7]}, folder="sweep")
    assert_type(swept, Sweep)
    assert_type(swept.best, Point)
    assert_type(swept.best.worst, int)
    found = forged_fx.search(model, stats, x, y, eps=8 / 255, kinds=["clamp"], confirm=(x[:9] / 2, y[:9]), seconds=60)
    assert_type(found, Search)
    assert_type(found.best, Finalist | None)
    return found.forge(model, stats)


def version() -> str:
    return forged_fx.__version__


def mistakes(model: nn.Module, stats: Stats, x: Tensor) -> None:
    """What a checker has to refuse: an ignore that is not needed is itself an error."""
    forged_fx.calibrate(model, [x], max_batches="ten")  # type: ignore[arg-type]
    forged_fx.transform(model, stats, ratios=2**-6)  # type: ignore[call-arg]
    forged_fx.transform(model, stats, kind=7)  # type: ignore[arg-type]
    forged_fx.evaluate(model, x=x, eps=8 / 255)  # type: ignore[call-arg]
    forged_fx.sweep(model, stats, x, x)  # type: ignore[call-arg]
    forged_fx.search(model, stats, x, x, eps="8/255")  # type: ignore[arg-type]
    forged_fx.sparsity(model)  # type: ignore[call-arg]
    forged_fx.set_ratio(model)  # type: ignore[call-arg]
    print(forged_fx.forge)  # type: ignore[attr-defined]
