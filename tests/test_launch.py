"""A kernel is asked once for its machine code, and again whenever something that decides which it is has changed."""

import contextlib

import pytest
import torch

triton = pytest.importorskip("triton")
launching = pytest.importorskip("forged_fx.kernels.launch")
threshold = pytest.importorskip("forged_fx.kernels.threshold")

ARG_NAMES = threshold.threshold_kernel.arg_names


class Kernel(triton.JITFunction):
    """Stands for a kernel on a GPU: notes what it is asked for, and what its machine code is run with."""

    def __init__(self):
        self.arg_names, self.asked, self.runs = ARG_NAMES, [], []

    def __getitem__(self, grid):
        def ask(*tensors, **rest):
            self.asked.append((grid, tensors, rest))
            return self

        return ask if len(grid) == 1 else lambda *args: self.runs.append((grid, args))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(launching, "_known", {})
    kernel = Kernel()
    monkeypatch.setattr(threshold, "threshold_kernel", kernel)
    return kernel


X, T = torch.zeros(4100), torch.tensor(0.5)


def addresses(tensors):
    return tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)


def test_asked_once_and_run_with_the_same_arguments(kernel):
    results = [threshold.launch_threshold(X, T) for _ in range(3)]
    ((grid, tensors, rest),) = kernel.asked
    assert rest.pop("num_warps") == 4 and len(kernel.runs) == 2
    assert tensors == (X, T, results[0])
    for y, (run_grid, args) in zip(results[1:], kernel.runs, strict=True):
        assert run_grid == (*grid, 1, 1) and args[:3] == addresses((X, T, y))
        assert dict(zip(kernel.arg_names[3:], args[3:], strict=True)) == rest


@pytest.mark.parametrize(
    "x, t", [(X.half(), T), (X[:4096], T), (X, T.double())], ids=["dtype", "size", "dtype of a parameter"]
)
def test_asked_again_for_what_decides(kernel, x, t):
    threshold.launch_threshold(X, T)
    threshold.launch_threshold(x, t)
    assert len(kernel.asked) == 2 and not kernel.runs


ON = torch.rand(2, 16, 4, 4)  # channels of 16: one for each case of storage order
BY_CHANNEL = {key: torch.rand(16) for key in ("mean", "var", "weight", "bias")}
# launcher: its module, the kernel, a call, and what decides about the machine code or its arguments
KEYS = {
    "elementwise": (
        "fused", "elementwise_threshold", {"x": ON, "t": T, **BY_CHANNEL},
        {
            "x": torch.rand(3, 16, 4, 4), "t": T.double(), "weight": torch.rand(16).half(), "bias": None, "eps": 0.5,
            "residual": torch.rand(2, 16, 4, 4), "activation": "relu", "keep": "value", "function": "soft",
        },
    ),
    "elementwise, another layout": (
        "fused", "elementwise_threshold", {"x": ON, "t": T, **BY_CHANNEL},
        {"x": torch.rand(2, 4, 4, 16).permute(0, 3, 1, 2)},
    ),
    "elementwise, another channel": (
        "fused", "elementwise_threshold", {"x": torch.rand(16, 16), "t": T, "weight": torch.rand(16)}, {"channel": 0},
    ),
    "elementwise, the sum": (
        "fused", "elementwise_threshold", {"x": ON, "t": T, "residual": ON.clone(), "keep": "value"},
        {"add_first": True, "keep": None},
    ),
    "norm": (
        "norm", "norm_threshold", {"x": torch.rand(4, 16), "t": T, "shape": [16], "weight": torch.rand(16)},
        {
            "x": torch.rand(8, 16), "t": T.double(), "weight": None, "bias": torch.rand(16), "eps": 0.5, "rms": True,
            "keep": "value", "function": "soft",
        },
    ),
    "norm, another row": (
        "norm", "norm_threshold", {"x": torch.rand(4, 16), "t": T, "shape": [16]}, {"shape": [4, 16]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_a_fused_kernel_is_asked_again_for_what_decides(name, kernel, monkeypatch):
    module, operator, call, changes = KEYS[name]
    module = pytest.importorskip(f"forged_fx.kernels.{module}")
    kernel.arg_names = getattr(module, f"{operator}_kernel").arg_names
    monkeypatch.setattr(module, f"{operator}_kernel", kernel)
    launch = getattr(module, f"launch_{operator}")
    for given in (call, *(call | {key: value} for key, value in changes.items())):
        kernel.asked.clear(), kernel.runs.clear()
        launch(**given), launch(**given)
        assert len(kernel.asked) == len(kernel.runs) == 1, given
        ((_, tensors, rest),) = kernel.asked
        ((_, args),) = kernel.runs
        results = [kernel.arg_names.index(name) for name in kernel.arg_names if name in ("y_ptr", "raw_ptr")]
        inputs = [i for i in range(len(tensors)) if i not in results]
        assert [args[i] for i in inputs] == [addresses(tensors)[i] for i in inputs]
        assert [args[i] is None for i in results] == [tensors[i] is None for i in results]
        behind = kernel.arg_names[len(tensors) :]
        assert dict(zip(behind, args[len(tensors) :], strict=True)) == {key: rest[key] for key in behind}


SQUARE, MEAN = torch.rand(16, 16), (torch.rand(16), torch.rand(16))


@pytest.mark.parametrize("backward", [False, True])
def test_a_kinds_kernel_is_asked_again_for_what_decides(backward, kernel, monkeypatch):
    kinds = pytest.importorskip("forged_fx.kernels.kinds")
    name, launch = ("kind_backward_kernel", kinds.launch_backward) if backward else ("kind_kernel", kinds.launch)
    kernel.arg_names = getattr(kinds, name).arg_names
    monkeypatch.setattr(kinds, name, kernel)
    x = (SQUARE, SQUARE) if backward else (SQUARE,)
    for rule, *parameters in (("soft", T), ("clamp", T), ("band", T, T), ("mean", *MEAN, 0), ("mean", *MEAN, 1)):
        kernel.asked.clear(), kernel.runs.clear()
        launch(rule, *x, *parameters), launch(rule, *x, *parameters)
        assert len(kernel.asked) == len(kernel.runs) == 1, (rule, parameters)


def test_asked_for_each_kernel_and_device(kernel, monkeypatch):
    threshold.launch_threshold(X, T)
    another = Kernel()
    monkeypatch.setattr(threshold, "threshold_kernel", another)
    threshold.launch_threshold(X, T)
    assert len(another.asked) == 1 and not another.runs


def test_asked_each_time_where_an_address_is_odd(kernel):
    """Machine code for aligned addresses must not get them, nor the other way round."""
    odd = torch.zeros(4101)[1:]
    for x in (X, odd, odd, X):
        threshold.launch_threshold(x, T)
    assert len(kernel.asked) == 3 and len(kernel.runs) == 1


def test_asked_on_the_tensors_device_where_another_is_current(kernel, monkeypatch):
    threshold.launch_threshold(X, T)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    threshold.launch_threshold(X, T)
    assert len(kernel.asked) == 2 and not kernel.runs


def test_ever_new_sizes_do_not_fill_the_memory(kernel, monkeypatch):
    monkeypatch.setattr(launching, "MOST", 8)
    for size in range(1, 30):
        threshold.launch_threshold(X[:size], T)
    assert len(launching._known) <= 8 and not kernel.runs
