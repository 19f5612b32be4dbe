"""benchmarks/gpu.py, rehearsed without a GPU: every step runs, on tiny shapes, the kernels interpreted."""

import contextlib
import csv
import math
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import kernel_cases
from gpu import LATE

from forged_fx.thresholds import thresholds_of

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_none(capsys: pytest.CaptureFixture) -> None:
    assert gpu.main([]) == 0
    assert "no GPU" in capsys.readouterr().out


def test_rehearsal(tmp_path: Path) -> None:
    command = "benchmarks/gpu.py --device cpu --dtype float16 --runs 1 --batch 2 --models digits nonsense --only band"
    command = [*command.split(), "--modes", "eager", "eager, unfused", "compiled", "--csv", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "FAILED: nonsense (float16, compiled): ValueError" in done.stderr, done.stderr
    assert "a rehearsal on the CPU: the times mean nothing" in done.stdout
    kernels, models = (list(csv.DictReader((tmp_path / f"gpu_{name}.csv").open())) for name in ("kernels", "models"))
    assert len(kernels) == 3 and {(row["verdict"], row["left_out"]) for row in kernels} == {("ok", "")}
    failed, measured = ([row for row in models if (row["left_out"] == "") is ok] for ok in (False, True))
    assert ["model's name begins with" in row["left_out"] for row in failed] == 3 * [True]
    fused = {"eager": "2", "eager, unfused": "0", "compiled": "0"}
    assert {row["mode"]: row["fused"] for row in measured} == fused
    for row in measured:
        figures = {key: float(row[key]) for key in ("plain_ms", "forged_ms", "ratio", "low", "high")}
        assert all(0 < figure < math.inf for figure in figures.values()), figures
        assert figures["ratio"] == pytest.approx(figures["plain_ms"] / figures["forged_ms"], rel=1e-3), "of one round"


@pytest.mark.parametrize("mode", [name for name, mode in gpu.MODES.items() if mode.mode])
def test_both_models_are_compiled_in_the_same_mode(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, caching, compile = {}, set(), torch.compile

    def compiled(model: torch.nn.Module, backend: Any, **options: Any) -> Any:
        if backend not in gpu.BACKENDS.values():  # forged_fx.cost's, which only looks at the graph
            return compile(model, backend=backend, **options)
        asked[backend] = (bool(thresholds_of(model)), options.get("mode", "default"))

        def run(x: torch.Tensor) -> torch.Tensor:
            caching.add(torch._inductor.config.fx_graph_cache)
            return model(x)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    args = gpu.options(["--device", "cpu", "--batch", "1", "--runs", "1"])
    gpu.measure_model("digits", torch.float32, gpu.MODES[mode], args)
    wanted = gpu.MODES[mode].mode
    assert asked == {"inductor": (False, wanted), "forged": (True, wanted)}
    assert caching == {wanted != "max-autotune"}, "there, contests are held anew"


# name, ms: as the profiler lists them, in order
PLAIN = [("triton_poi_fused_relu_0", 1.0), ("void product<128>(int)", 4.0), ("triton_poi_fused_relu_1", 2.0)]
OURS = [
    ("triton_poi_fused_threshold_0", 0.5),
    ("triton_poi_fused_relu_threshold_1", 1.5),
    ("void product<64>(int)", 3.0),
]


def test_where_the_time_goes() -> None:
    figures = gpu.profiled(PLAIN, [*OURS, ("triton_tem_fused_mm_2", 0.25), ("triton_poi_fused_relu_threshold_3", 2.0)])
    assert (figures["launches"], figures["more"]) == (3, 2)
    assert (figures["loops"], figures["others"]) == (3, 4)
    assert (figures["forged_loops"], figures["forged_others"]) == (4, 3.25), "a product is no loop"
    assert figures["slower"].split("; ") == [
        "triton_poi_fused 0.000 ms (0) -> 0.500 ms (1)",
        "triton_poi_fused_relu 3.000 ms (2) -> 3.500 ms (2)",
        "triton_tem_fused_mm 0.000 ms (0) -> 0.250 ms (1)",
    ]
    assert gpu.profiled([], OURS) == {}, "nothing is made up where the profiler saw none"


def do(name: str) -> None:
    """What kernels and models do that are called so."""
    if name == "slow":
        with contextlib.suppress(Exception):  # as Inductor does, where it tries one way after the other
            time.sleep(20)
    if name == "broken":
        raise ValueError("as it should")


FAILED = "ValueError: as it should"
# kernels, models, seconds, the exit status, why each row was left out
RUNS = {
    "kernels leave half of the time": ("quick slow quick", "quick slow quick", 6, 0, ["", LATE, LATE, "", LATE, LATE]),
    "kernels alone take all of it": ("quick slow quick", "", 3, 0, ["", LATE, LATE]),
    "what fails is named": ("broken quick", "broken quick", 60, 1, [FAILED, "", FAILED, ""]),
}


@pytest.mark.parametrize("kernels, models, budget, status, left_out", RUNS.values(), ids=RUNS)
def test_the_others_figures_are_kept(
    kernels: str, models: str, budget: float, status: int, left_out: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path,
) -> None:  # fmt: skip
    right = kernel_cases.cases(1, side=4)["batch norm, relu"]

    def case(name: str) -> kernel_cases.Case:
        return replace(right, launch=lambda **given: do(name) or right.reference(**given))

    named = {f"{i} {name}": case(name) for i, name in enumerate(kernels.split())}
    monkeypatch.setattr(gpu, "cases", lambda *_, **__: named)
    monkeypatch.setattr(gpu, "measure_model", lambda name, *_: do(name) or {"ratio": 1.0})
    command = f"--device cpu --dtype float32 --modes eager --budget {budget} --csv {tmp_path} --models {models}"
    began = time.monotonic()
    assert gpu.main(command.split()) == status
    if LATE in left_out:
        assert budget <= time.monotonic() - began < budget + 10
    tables = [tmp_path / "gpu_kernels.csv", *[tmp_path / "gpu_models.csv"] * bool(models)]
    rows = [row for table in tables for row in csv.DictReader(table.open())]
    assert [row["left_out"] for row in rows] == left_out
    assert all(("ok" in row.values() or row.get("ratio") == "1") is not bool(row["left_out"]) for row in rows)
    out, err = capsys.readouterr()
    assert out.count(LATE) == left_out.count(LATE) and err.count("FAILED: ") == left_out.count(FAILED)


def test_a_wrong_kernel_is_found() -> None:
    case = kernel_cases.cases(1, side=4)["batch norm, relu"]
    given = gpu.filled(case, torch.float32, "cpu")
    right = replace(case, launch=case.reference)
    assert gpu.check(right, given) == (0, 0, 0.0, "ok")

    def off(error: float) -> kernel_cases.Case:
        return replace(case, launch=lambda **given: (case.reference(**given)[0] * (1 + error), None))

    assert gpu.check(off(1e-7), given)[3] == "ok"
    assert gpu.check(off(1e-5), given)[3] == "WRONG"
    one_sided = replace(case, launch=lambda **given: (case.reference(**{**given, "t": torch.tensor(0.41)})[0], None))
    assert gpu.check(one_sided, given)[3] == "WRONG"


COMMAND = "--device cpu --dtype float32 --models digits --batch 2 --runs 1 --only none --modes compiled max-autotune"


def test_what_is_compiled_ahead_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the process that measures: both graphs."""
    unknown = os.urandom(8).hex()
    monkeypatch.setenv("TORCH_COMPILE_CACHE_KEY_TAG", unknown)
    args = gpu.options([*COMMAND.split(), "--csv", str(tmp_path)])
    jobs = list(gpu.jobs(args, str(tmp_path)))
    assert [job.func.__name__ for job in jobs] == ["compile_kernels", *["compile_model"] * 2, *["contests"] * 2]
    assert gpu.ahead(jobs[:3], 2, time.monotonic() + 300) == 0
    torch._dynamo.utils.counters.clear()
    with torch.compiler.config.patch(cache_key_tag=unknown):
        gpu.measure_model("digits", torch.float32, gpu.MODES["compiled"], args)
    counts = torch._dynamo.utils.counters["inductor"]
    assert (counts["fxgraph_cache_hit"], counts["fxgraph_cache_miss"]) == (2, 0)


def test_what_a_contest_says_is_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "usual"))
    folders = []
    monkeypatch.setattr(gpu, "compile_model", lambda *_: folders.append(Path(gpu.cache_dir())))
    for job in list(gpu.jobs(gpu.options([*COMMAND.split(), "--csv", str(tmp_path)]), str(tmp_path)))[3:]:
        job()
    assert len({*folders}) == 2 and all(folder.parent == tmp_path and folder.name != "usual" for folder in folders)


def test_what_is_not_through_is_killed() -> None:
    began = time.monotonic()
    assert gpu.ahead([partial(time.sleep, 60)] * 3, 2, began + 3) == 3
    assert time.monotonic() - began < 20
    assert not multiprocessing.active_children()


def test_what_fails_is_no_more_through_than_what_is_cut_off() -> None:
    assert gpu.ahead([partial(os._exit, 3), partial(time.sleep, 0), partial(int, "x")], 2, time.monotonic() + 60) == 2
    with pytest.raises(ValueError, match="at least 1"):
        gpu.ahead([], 0, time.monotonic() + 1)


@pytest.mark.parametrize("mode", gpu.MODES)
def test_who_chooses(mode: str) -> None:
    """A graph in the cache holds what won its contests, so those are held anew; of block sizes, none is taken over."""
    config = torch._inductor.config
    before = config.fx_graph_cache, config.autotune_local_cache
    contests = gpu.MODES[mode].mode == "max-autotune"
    with gpu.choosing(gpu.MODES[mode]):
        assert (config.fx_graph_cache, config.autotune_local_cache) == (not contests, contests)
        assert not torch.is_grad_enabled()
    assert (config.fx_graph_cache, config.autotune_local_cache) == before


def test_no_rows_leave_a_table_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("of an earlier run")
    assert gpu.report(gpu.KernelRow, iter(()), gpu.KERNEL_COLUMNS, tmp_path / "rows.csv", {}) == []
    assert (tmp_path / "rows.csv").read_text() == "of an earlier run"


def test_a_missing_folder_is_made_first(tmp_path: Path) -> None:
    args = gpu.options(["--device", "cpu", "--csv", str(tmp_path / "a" / "b"), "--dtype", "float32", "float32"])
    assert args.csv.is_dir() and gpu.dtypes(args) == ["float32"]
    with pytest.raises(SystemExit):
        gpu.options(["--ahead", "-1"])
