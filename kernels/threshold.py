"""The forged function `0 where |x| < t, else x` and its gradient, as Triton kernels.

    device functions   pure arithmetic on values: what fused kernels build on
    kernels            loads, stores and index arithmetic around them
    launchers          torch tensors in, torch tensors out, in any layout

The launchers want CUDA tensors. Under TRITON_INTERPRET=1 they take CPU tensors too.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, dtypes, launch

NUM_WARPS = 4
VECTOR_BYTES = 16  # the widest load and store of a thread: 128 bits
VECTORS_PER_THREAD = 2  # two loads in flight per thread, and half the index arithmetic per element


@triton.jit
def _below(x, t):
    # Wide first: the interpreter compares bfloat16 as raw bits, and every implementation must decide alike.
    wide: tl.constexpr = tl.float64 if x.dtype == tl.float64 else tl.float32
    return tl.abs(x.to(wide)) < t.to(wide)


@triton.jit
def threshold(x, t):
    return tl.where(_below(x, t), 0.0, x)


@triton.jit
def threshold_backward(grad, x, t):
    return tl.where(_below(x, t), 0.0, grad)


@triton.jit
def block_offsets(block, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    return block.to(INDEX) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def threshold_kernel(x_ptr, t_ptr, y_ptr, numel, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    offsets = block_offsets(tl.program_id(0), BLOCK, INDEX)
    mask = offsets < numel
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(y_ptr + offsets, threshold(x, tl.load(t_ptr)), mask=mask)


@triton.jit
def threshold_backward_kernel(grad_ptr, x_ptr, t_ptr, y_ptr, numel, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    offsets = block_offsets(tl.program_id(0), BLOCK, INDEX)
    mask = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=mask)
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(y_ptr + offsets, threshold_backward(grad, x, tl.load(t_ptr)), mask=mask)


def block_rule(dtype: torch.dtype, numel: int) -> dict:
    """How an elementwise kernel over `numel` elements of `dtype` is cut into blocks: its keyword arguments.

    A rule rather than autotuning: the work is bound by memory, and 128-bit accesses are all there is to tune.
    Offsets are 64 bits wide only where the last block, which may reach past numel, would overflow 32.
    """
    block = NUM_WARPS * 32 * VECTORS_PER_THREAD * VECTOR_BYTES // dtype.itemsize
    last = triton.cdiv(numel, block) * block - 1
    return {"BLOCK": block, "INDEX": tl.int64 if last >= 2**31 else tl.int32, "num_warps": NUM_WARPS}


def launch_threshold(x: Tensor, t: Tensor) -> Tensor:
    """`reference.threshold` in one kernel launch: same arguments, same result bit for bit.

    A non-overlapping and dense x, in whatever order of dimensions, is read and written in storage order,
    without a copy. Any other (expanded, or with gaps) is copied into the result's layout first, and the
    kernel works in place.
    """
    y = torch.empty_like(x)
    source = x if x.stride() == y.stride() else y.copy_(x)
    launch_blocks(threshold_kernel, source, t, y)
    return y


def launch_threshold_backward(grad: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """`reference.threshold_backward` in one kernel launch: same arguments, same result bit for bit.

    The result is laid out like that of `launch_threshold`; whichever of grad and x is not is copied first.
    """
    y = torch.empty_like(x)
    x = x if x.stride() == y.stride() else torch.empty_like(y).copy_(x)
    grad = grad if grad.stride() == y.stride() else y.copy_(grad)
    launch_blocks(threshold_backward_kernel, grad, x, t, y)
    return y


def launch_blocks(kernel: triton.JITFunction, *tensors: Tensor | None, **constants: Any) -> None:
    """Run an elementwise kernel over tensors of one layout, scalars and parameters; the last is the result."""
    y = tensors[-1]
    if numel := y.numel():

        def plan() -> Plan:
            rule = block_rule(y.dtype, numel)
            return triton.cdiv(numel, rule["BLOCK"]), {"numel": numel, **constants, **rule}

        launch(kernel, tensors, (numel, *constants.values(), *dtypes(tensors)), plan)
