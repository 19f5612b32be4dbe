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


def test_asked_once_and_run_with_the_same_arguments(kernel):
    for _ in range(3):
        threshold.launch_threshold(X, T)
    ((grid, tensors, rest),) = kernel.asked
    assert rest.pop("num_warps") == 4 and len(kernel.runs) == 2
    for run_grid, args in kernel.runs:
        assert run_grid == (*grid, 1, 1)
        assert args[:2] == tensors[:2] == (X, T) and args[2] is not tensors[2]
        assert dict(zip(kernel.arg_names[3:], args[3:], strict=True)) == rest


@pytest.mark.parametrize(
    "x, t", [(X.half(), T), (X[:4096], T), (X, T.double())], ids=["dtype", "size", "dtype of a parameter"]
)
def test_asked_again_for_what_decides(kernel, x, t):
    threshold.launch_threshold(X, T)
    threshold.launch_threshold(x, t)
    assert len(kernel.asked) == 2 and not kernel.runs


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
