"""Compile Triton kernels ahead of time, on any machine, and read off the machine code what a GPU would run.

Triton ships the assembler and disassembler that this needs. Nothing is executed, so nothing here is a time.
"""

import contextlib
import functools
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

ARCHITECTURES = (80, 90, 100)  # A100, H100, B200
WARP = 32

# How Triton's signatures spell a pointer to each element type.
POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}


@dataclass(frozen=True)
class Figures:
    """What the machine code of one kernel holds; counts are per thread, without the padding at its end."""

    registers: int
    spills: int  # instructions that move a register to or from local memory
    shared: int  # bytes of shared memory, per block
    loads: Counter[int]  # from global memory: width in bits -> how many
    stores: Counter[int]  # to global memory
    instructions: int
    opcodes: Counter[str]
    ptx: str

    def per_element(self, block: int, num_warps: int) -> float:
        """Instructions for each element of a block, in kernels without loops, which run each once."""
        return self.instructions * num_warps * WARP / block


def compile_for(
    arch: int,
    kernel: triton.JITFunction,
    signature: dict[str, str],
    num_warps: int,
    aligned: bool | Collection[str] = True,
    **constants: Any,
) -> CompiledKernel:
    """Compile for compute capability `arch` (90 means sm_90).

    signature: argument name -> Triton type (`"*fp16"`, `"i32"`), in any order, without the constants.
    aligned: which pointers and integers are multiples of 16, as a launch with such arguments finds out by itself.
    constants: the kernel's compile-time constants.
    """
    types = signature | dict.fromkeys(constants, "constexpr")
    multiples = aligned if isinstance(aligned, Collection) else signature if aligned else ()
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in multiples},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, WARP), options={"num_warps": num_warps})


@dataclass(frozen=True)
class Launch:
    """A launch that was about to happen: the kernel, compiled for its arguments as Triton would, and its grid."""

    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str]
    num_warps: int
    programs: int
    tensors: dict[str, torch.Tensor]

    def compiled_for(self, arch: int) -> CompiledKernel:
        return compile_for(
            arch, self.kernel, self.signature, num_warps=self.num_warps, aligned=self.aligned, **self.constants
        )


def launches(module: ModuleType, call: Callable[[], Any]) -> list[Launch]:
    """What `call` would launch of the kernels that `module` defines. Nothing is: its tensors may be on "meta"."""
    found: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: triton.JITFunction) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable:
            return lambda *args, **kwargs: found.append(_specialise(self.kernel, math.prod(grid), args, kwargs))

    kernels = {n: k for n, k in vars(module).items() if isinstance(k, triton.JITFunction) and n.endswith("_kernel")}
    with contextlib.ExitStack() as stack:
        for name, kernel in kernels.items():
            stack.enter_context(mock.patch.object(module, name, Recorder(kernel)))
        call()
    return found


def _specialise(kernel: triton.JITFunction, programs: int, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """As Triton does: None and 1 are constants, multiples of 16 are known to be such."""
    num_warps = kwargs.pop("num_warps")
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    constant = {n for n, v in values.items() if n in constexprs or v is None or (type(v) is int and v == 1)}
    signature = {name: _type_of(value) for name, value in values.items() if name not in constant}
    aligned = {
        n for n in signature if isinstance(values[n], torch.Tensor) or (type(values[n]) is int and not values[n] % 16)
    }
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    constants = {name: values[name] for name in constant}
    return Launch(kernel, signature, constants, frozenset(aligned), num_warps, programs, tensors)


def _type_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return POINTER[value.dtype]
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"


def figures(compiled: CompiledKernel) -> Figures:
    """Disassemble a compiled kernel and count."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        code = _tool("nvdisasm", "-c", cubin.name)
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
    opcodes = _opcodes(code)
    return Figures(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=sum(op.startswith(("LDL", "STL")) for op in opcodes),
        shared=compiled.metadata.shared,
        loads=Counter(_width(op) for op in opcodes if op.startswith("LDG")),
        stores=Counter(_width(op) for op in opcodes if op.startswith("STG")),
        instructions=len(opcodes),
        opcodes=Counter(opcodes),
        ptx=compiled.asm["ptx"],
    )


def _opcodes(code: str) -> list[str]:
    """The instructions in order. The endless loop and the no-ops behind the last exit are padding."""
    line = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
    found = [match[1] for match in map(line.search, code.splitlines()) if match]
    found = [op for op in found if op != "NOP"]
    return found[:-1] if found[-1] == "BRA" else found


def _width(opcode: str) -> int:
    """Bits that one load or store moves: `LDG.E.128` says so, and `LDG.E.U16` too; none said is 32."""
    sizes = re.findall(r"\.[US]?(8|16|32|64|128|256)\b", opcode)
    return max(map(int, sizes), default=32)


def _tool(name: str, *args: str) -> str:
    return subprocess.run([_tools() / name, *args], capture_output=True, text=True, check=True).stdout


@functools.cache
def _tools() -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
