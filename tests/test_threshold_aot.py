"""What the kernels become on an A100, H100 and B200, read off the machine code: no GPU is needed for this."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.backends.nvidia")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import aot

from forged_fx.kernels import kinds
from forged_fx.kernels import threshold as kernels

KERNELS = {"forward": kernels.threshold_kernel, "backward": kernels.threshold_backward_kernel}
LIMIT = 8  # machine instructions per element


def machine_code(
    arch: int, direction: str, dtype: torch.dtype, numel: int = 2**20, aligned: bool = True
) -> aot.Figures:
    kernel, rule = KERNELS[direction], kernels.block_rule(dtype, numel)
    tensors = {name: aot.POINTER[dtype] for name in kernel.arg_names if name.endswith("_ptr")}
    signature = tensors | {"t_ptr": "*fp32", "numel": "i32" if numel < 2**31 else "i64"}
    return aot.figures(aot.compile_for(arch, kernel, signature, aligned=aligned, **rule))


def per_element(figures: aot.Figures, dtype: torch.dtype) -> float:
    rule = kernels.block_rule(dtype, 2**20)
    return figures.per_element(rule["BLOCK"], rule["num_warps"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", KERNELS)
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_machine_code(arch: int, direction: str, dtype: torch.dtype) -> None:
    figures = machine_code(arch, direction, dtype)
    inputs = {"forward": 1, "backward": 2}[direction]
    vectors = kernels.VECTORS_PER_THREAD
    assert figures.spills == 0 and figures.shared == 0
    assert figures.loads == {128: inputs * vectors, 32: 1}  # the threshold is the one narrow load
    assert figures.stores == {128: vectors}
    assert per_element(figures, dtype) <= LIMIT
    assert ".ftz" not in figures.ptx  # flushing denormals to zero would drop those above the threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_beyond_32_bits(dtype: torch.dtype) -> None:
    figures = machine_code(90, "forward", dtype, numel=2**31 + 16)
    assert figures.spills == 0 and set(figures.stores) == {128} and per_element(figures, dtype) <= LIMIT


def test_misaligned_is_narrow() -> None:
    """The figures can tell the difference: nothing is promised of a pointer, so nothing wide is emitted."""
    figures = machine_code(90, "forward", torch.float32, aligned=False)
    assert set(figures.stores) == {32}


PARAMETERS = {"band": (torch.empty((), device="meta"),) * 2, "mean": (torch.empty(64, device="meta"),) * 2}


@pytest.mark.parametrize(
    ("rule", "direction", "arch"),
    [
        *((rule, way, 90) for rule in ("soft", "band", "mean") for way in ("forward", "backward")),
        ("shifted", "forward", 80),
        ("clamp", "forward", 100),
        ("one_sided", "backward", 100),
    ],
)
def test_machine_code_of_the_other_kinds(rule: str, direction: str, arch: int) -> None:
    x = torch.empty(32, 64, 28, 28, dtype=torch.bfloat16, device="meta")
    arguments = (*PARAMETERS.get(rule, (torch.empty((), device="meta"),)), *([1] if rule == "mean" else []))
    run, inputs = (kinds.launch, 1) if direction == "forward" else (kinds.launch_backward, 2)
    (launch,) = aot.launches(kinds, lambda: run(rule, *(x,) * inputs, *arguments))
    figures = aot.figures(launch.compiled_for(arch))
    vectors = kernels.VECTORS_PER_THREAD
    assert figures.spills == 0 and figures.shared == 0
    assert figures.loads[128] == inputs * vectors and figures.stores == {128: vectors}
    elements = kernels.block_rule(x.dtype, x.numel())
    limit = 24 if rule == "mean" else 2 * LIMIT  # a channel is found by division, a float32 result is rounded
    assert figures.per_element(elements["BLOCK"], elements["num_warps"]) <= limit
    assert ".ftz" not in figures.ptx
