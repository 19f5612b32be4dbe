"""The Triton kernels equal the reference bit for bit: interpreted on the CPU, and on a GPU if any."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import interpreted
import pytest
import torch
from kinks import DTYPES, LAYOUTS, THRESHOLDS, same, values

from forged_fx import ops
from forged_fx.kernels import reference

triton = pytest.importorskip("triton")
tl = triton.language

ROOT = Path(__file__).parents[1]
NATIVE = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return interpreted.kernels("threshold")


def thresholds(dtype: torch.dtype) -> list[torch.Tensor]:
    # The interpreter gets bfloat16 denormals wrong when it widens them: no threshold among them.
    lost = torch.finfo(dtype).smallest_normal if dtype == torch.bfloat16 else 0
    return [torch.tensor(t) for t in THRESHOLDS if not 0 < t < lost]


def gradients_of(x: torch.Tensor) -> list[torch.Tensor]:
    """Gradients laid out like x, contiguous, in reverse, and with one value for all, as from `x.sum()`."""
    grad = torch.linspace(-2, 2, x.numel(), dtype=x.dtype).reshape(x.shape)
    reverse = tuple(range(x.dim()))[::-1]
    backwards = grad.permute(reverse).contiguous().permute(reverse)
    one_value = torch.full((), -0.0, dtype=x.dtype).expand(x.shape)
    return [torch.empty_like(x).copy_(grad), grad, backwards, one_value]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_the_reference(kernels: ModuleType, dtype: torch.dtype) -> None:
    for t in thresholds(dtype):
        x = values(t.item(), dtype)
        grad = x.flip(0)
        assert same(kernels.launch_threshold(x, t), reference.threshold(x, t)), t
        result = kernels.launch_threshold_backward(grad, x, t)
        assert same(result, reference.threshold_backward(grad, x, t)), t


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_are_the_reference(kernels: ModuleType, dtype: torch.dtype, layout: str) -> None:
    t = torch.tensor(0.1)
    x = LAYOUTS[layout](values(0.1, dtype))
    before = x.clone()
    assert same(kernels.launch_threshold(x, t), reference.threshold(x, t))
    for grad in gradients_of(x):
        assert same(kernels.launch_threshold_backward(grad, x, t), reference.threshold_backward(grad, x, t))
    assert same(x.clone(), before)


def test_operator_launches_them(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator does with CUDA tensors, short of the device."""
    launchers = kernels.launch_threshold, kernels.launch_threshold_backward
    monkeypatch.setattr(ops, "launchers", lambda function: launchers)
    x, t = torch.randn(3, 5).mT, torch.tensor(0.5)
    forward, backward = (ops.IMPLEMENTATIONS[name]["CUDA"] for name in ("threshold", "threshold_backward"))
    assert same(forward(x, t), reference.threshold(x, t))
    assert same(forward(x, t, True), reference.threshold(x, t))
    assert same(backward(x + 1, x, t), reference.threshold_backward(x + 1, x, t))


@pytest.mark.parametrize("numel", [1, 511, 512, 513, 4096, 4099])
def test_any_number_of_blocks(kernels: ModuleType, numel: int) -> None:
    x, t = torch.randn(numel), torch.tensor(0.5)
    assert same(kernels.launch_threshold(x, t), reference.threshold(x, t))
    assert same(kernels.launch_threshold_backward(x + 1, x, t), reference.threshold_backward(x + 1, x, t))


@pytest.mark.parametrize("t_dtype", DTYPES, ids=str)
def test_threshold_of_any_dtype_is_compared_in_float32(kernels: ModuleType, t_dtype: torch.dtype) -> None:
    """`model.half()` makes float16 of a threshold, and `model.double()` float64."""
    t = torch.tensor(0.7, dtype=torch.float64).to(t_dtype)
    for dtype in DTYPES:
        x = values(t.item(), dtype)
        assert same(kernels.launch_threshold(x, t), reference.threshold(x, t)), dtype


DENSE = ["contiguous", "channels_last", "transposed", "permuted", "misaligned", "one_channel"]


@pytest.mark.parametrize("layout", DENSE)
def test_dense_tensors_are_not_copied(kernels: ModuleType, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("copied")

    x, t = LAYOUTS[layout](values(0.5, torch.float32)), torch.tensor(0.5)
    grad = torch.empty_like(x).fill_(1)
    expected = reference.threshold(x, t), reference.threshold_backward(grad, x, t)
    monkeypatch.setattr(kernels, "launch_blocks", lambda kernel, *tensors: launched.append(tensors))
    monkeypatch.setattr(torch.Tensor, "copy_", refuse)
    launched: list[tuple] = []
    results = kernels.launch_threshold(x, t), kernels.launch_threshold_backward(grad, x, t)
    assert [r.stride() for r in results] == [e.stride() for e in expected]
    assert launched[0][0] is x and launched[1][:2] == (grad, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_index_is_as_wide_as_numel_needs(kernels: ModuleType, dtype: torch.dtype) -> None:
    block = kernels.block_rule(dtype, 1)["BLOCK"]
    numels = (1, 2**31 - block, 2**31, 2**31 + 1, 2**40)
    widths = [kernels.block_rule(dtype, numel)["INDEX"] for numel in numels]
    assert widths == [tl.int32, tl.int32, tl.int32, tl.int64, tl.int64]


block_offsets = None  # a kernel reads globals only: the test below puts the kernels' own here


def probe(out_ptr, block, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), block_offsets(block, BLOCK, INDEX).to(tl.int64))


def test_offsets_beyond_32_bits(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block of a tensor with more than 2^31 elements, without the tensor."""
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setitem(globals(), "block_offsets", kernels.block_offsets)
    numel = 2**31 + 5
    rule = kernels.block_rule(torch.float32, numel)
    block = triton.cdiv(numel, rule["BLOCK"]) - 1
    offsets = {}
    for index in (rule["INDEX"], tl.int32):
        out = torch.zeros(rule["BLOCK"], dtype=torch.int64)
        InterpretedFunction(probe)[(1,)](out, block, BLOCK=rule["BLOCK"], INDEX=index)
        offsets[index] = out
    assert torch.equal(offsets[tl.int64], torch.arange(rule["BLOCK"]) + block * rule["BLOCK"])
    assert (offsets[tl.int32] < 0).any()  # so the rule is needed


def test_runs_on_the_cpu_under_triton_interpret() -> None:
    """As a user would run it: the environment variable, then the import."""
    code = (
        "import torch; from forged_fx.kernels import reference, threshold as kernels; "
        "x, t = torch.randn(3000).bfloat16(), torch.tensor(0.5); "
        "assert torch.equal(kernels.launch_threshold(x, t), reference.threshold(x, t))"
    )
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=interpreted, cwd=ROOT)


@pytest.mark.gpu
@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_device_is_the_reference(dtype: torch.dtype) -> None:
    from forged_fx.kernels import threshold as kernels

    for t in (torch.tensor(t, device="cuda") for t in THRESHOLDS):
        for layout in LAYOUTS.values():
            x = _on_device(layout(values(t.item(), dtype)))
            assert same(kernels.launch_threshold(x, t), reference.threshold(x, t)), t
            for grad in map(_on_device, gradients_of(x.cpu())):
                result = kernels.launch_threshold_backward(grad, x, t)
                assert same(result, reference.threshold_backward(grad, x, t)), t


def _on_device(x: torch.Tensor) -> torch.Tensor:
    """With the same strides, gaps included; `.cuda()` closes them."""
    storage = torch.empty(x.untyped_storage().nbytes(), dtype=torch.uint8, device="cuda")
    storage.copy_(torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()))
    return storage.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.gpu
@NATIVE
def test_device_reaches_beyond_32_bits() -> None:
    from forged_fx.kernels import threshold as kernels

    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB of device memory")
    x = torch.full((2**31 + 4097,), 0.25, dtype=torch.float16, device="cuda")
    x[-5000:] = torch.linspace(-1, 1, 5000, device="cuda")
    y = kernels.launch_threshold(x, torch.tensor(0.5, device="cuda"))
    assert same(y[-5000:], reference.threshold(x[-5000:], torch.tensor(0.5, device="cuda")))
    assert not y[:-5000].any()
