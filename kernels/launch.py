"""Running a Triton kernel again without asking again what is known.

`kernel[grid](...)` asks in each call, of each argument, what decides which machine code runs: its dtype, whether an
address or a number is a multiple of 16, whether the kernel has to be compiled. That takes longer than most kernels run.
So the machine code that Triton chose is kept here, with all that was worked out for it, by what decided.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
from torch import Tensor

Plan = tuple[int, dict[str, Any]]  # how many programs, and the kernel's arguments behind its tensors, by name

ALIGNED = 16  # bytes: what Triton asks of an address
MOST = 4096  # cases that are kept: inputs of ever new sizes must not fill the memory
_known: dict[tuple, tuple[Callable, list]] = {}


def dtypes(tensors: tuple[Tensor | None, ...]) -> tuple[torch.dtype | None, ...]:
    return tuple([None if tensor is None else tensor.dtype for tensor in tensors])


def launch(kernel: Any, tensors: tuple[Tensor | None, ...], key: Hashable, plan: Callable[[], Plan]) -> None:
    """Run a kernel over tensors of one device, which are its first arguments.

    key: what decides about the rest besides the kernel, the tensors' dtypes among it: `plan` is called if it is new.
    Tensors may be on a CPU where the kernel is interpreted.
    """
    if not isinstance(kernel, triton.JITFunction):  # interpreted
        programs, rest = plan()
        kernel[(programs,)](*tensors, **rest)
        return
    device, addresses, together = tensors[0].device.index, [], 0
    for tensor in tensors:
        address = None if tensor is None else tensor.data_ptr()
        addresses.append(address)
        together |= address or 0
    case = (id(kernel), device, key)
    known = None if together % ALIGNED else _known.get(case)
    if known is not None and torch.cuda.current_device() == device:
        run, values = known
        run(*addresses, *values)  # of a tensor, Triton would ask for its address, and the driver whether that is right
        return
    programs, rest = plan()
    with torch.cuda.device(device):  # Triton launches on the current device
        compiled = kernel[(programs,)](*tensors, **rest)
    if not together % ALIGNED:
        if len(_known) >= MOST:
            _known.clear()
        values = [rest[name] for name in kernel.arg_names[len(tensors) :]]
        _known[case] = compiled[(programs, 1, 1)], values
