"""Make Inductor generate code for an NVIDIA GPU on a machine that has none, and read off what it would launch.

    import fake_gpu
    fake_gpu.install("sm_90")
    kernels = fake_gpu.kernels(model, x, backend="forged")

Tensors are fake (shapes, strides and dtypes only), the device's properties come from `DEVICES`, and Inductor is stopped
once its code is written: nothing runs. A kernel here is one that Inductor generates or a call of a library (matrix
product, convolution, attention); its bytes are those of every buffer that it reads or writes, once per kernel, as if
there were no cache.

`install` replaces private functions of PyTorch and Triton for the whole process. Written for torch 2.14, triton 3.8.
"""

import copy
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

# architecture -> name, compute capability, multiprocessors, bytes of shared memory that a block may have, of L2
DEVICES = {
    "sm_80": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 40 << 20),
    "sm_90": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 50 << 20),
    "sm_100": ("NVIDIA B200", (10, 0), 148, 232448, 126 << 20),
}


@dataclass(frozen=True)
class Kernel:
    """One launch. library: a call of cuBLAS, cuDNN and the like; else generated. ops: the ATen calls that it runs.
    reads, writes: buffer name -> bytes."""

    name: str
    library: bool
    ops: tuple[torch.fx.Node, ...]
    reads: dict[str, int]
    writes: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


# ---- the device


def install(architecture: str = "sm_90") -> None:
    """Pretend, from now on and for good, that this process has one GPU."""
    name, capability, processors, shared, l2 = DEVICES[architecture]
    properties = types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=processors, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        total_memory=80 << 30, shared_memory_per_block=49152, shared_memory_per_block_optin=shared,
        shared_memory_per_multiprocessor=shared + 1024, L2_cache_size=l2, is_integrated=0, is_multi_gpu_board=0,
        gcnArchName="", uuid="fake", pci_bus_id=0, pci_device_id=0, pci_domain_id=0, clock_rate=1980000,
        memory_clock_rate=2619000, memory_bus_width=5120,
    )  # fmt: skip
    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Callable] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device=None: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: name,
        "get_arch_list": lambda: [architecture],
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": lambda device=None: None,
        "_exchange_device": lambda device: -1,
        "_maybe_exchange_device": lambda device: -1,
        "mem_get_info": lambda device=None: (70 << 30, 80 << 30),
        "memory_allocated": lambda device=None: 0,
        "is_current_stream_capturing": lambda: False,
        "get_rng_state": lambda device="cuda": state,
        "set_rng_state": lambda state, device="cuda": None,
    }
    for key, answer in answers.items():
        setattr(torch.cuda, key, answer)
    for key in ("get_rng_state", "set_rng_state"):
        setattr(torch.cuda.random, key, answers[key])
    _tell_dynamo(answers, properties)
    _tell_inductor(capability)
    _tell_triton(capability)
    _choose_attention()


def _tell_dynamo(answers: dict[str, Callable], properties: Any) -> None:
    import torch._dynamo.device_interface as interface
    import torch._subclasses.fake_tensor as fake_tensor

    for key in ("current_device", "set_device", "device_count", "synchronize", "get_device_properties",
                "memory_allocated", "is_bf16_supported"):  # fmt: skip
        setattr(interface.CudaInterface, key, staticmethod(answers[key]))
    for key in ("exchange_device", "maybe_exchange_device"):
        setattr(interface.CudaInterface, key, staticmethod(answers["_" + key]))
    interface.CudaInterface.get_raw_stream = staticmethod(lambda index: 0)
    interface.caching_worker_device_properties["cuda"] = [properties]
    interface.caching_worker_current_devices["cuda"] = 0
    fake_tensor.init_gpu_context = lambda *args, **kwargs: None  # it would allocate for real
    fake_tensor.FakeTensorMode.avoid_device_init = property(lambda self: True)


def _tell_inductor(capability: tuple[int, int]) -> None:
    import torch._functorch.config
    from torch._inductor import config
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_map

    config.compile_threads = 1
    config.fx_graph_cache = False
    config.shape_padding = False  # it would run both ways and take the faster one
    config.triton.autotune_at_compile_time = False
    config.benchmark_epilogue_fusion = False
    config.benchmark_kernel = False
    torch._functorch.config.enable_autograd_cache = False

    class OnCPU(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            def move(value: Any) -> Any:
                return torch.device("cpu") if isinstance(value, torch.device) else value

            args, kwargs = tree_map(move, (args, kwargs or {}))
            return function(*args, **kwargs)

    fold = UniformValueConstantFolder.run_node

    def fold_on_cpu(self: Any, node: torch.fx.Node) -> Any:
        with OnCPU():
            return fold(self, node)

    UniformValueConstantFolder.run_node = fold_on_cpu

    # Where a GPU would time all ways to compute a product, take Triton's: the one that a neighbour can be a part of.
    from torch._inductor import select_algorithm
    from torch._inductor.select_algorithm import AlgorithmSelectorCache, TritonTemplateCaller

    select_algorithm.PRINT_AUTOTUNE = False

    def autotune(self: Any, name: str, input_nodes: Any, layout: Any, input_gen_fns: Any, choices: Any, *_: Any,
                 **__: Any) -> dict:  # fmt: skip
        return {choice: 1.0 + (not isinstance(choice, TritonTemplateCaller)) for choice in choices}

    AlgorithmSelectorCache.autotune = autotune
    AlgorithmSelectorCache.make_precompile_fn = lambda self, *args, **kwargs: lambda: None

    def as_float16(value: Any) -> Any:
        is_bfloat16 = isinstance(value, Tensor) and value.dtype == torch.bfloat16
        return torch.empty_like(value, dtype=torch.float16) if is_bfloat16 else value

    for key in ("_select_conv_backend", "_conv_determine_backend_memory_format"):
        # They ask cuDNN whether it has bfloat16, and there is none to ask: it answers as for float16.
        ask = getattr(torch._C, key)

        def answer(*args: Any, ask: Callable = ask, **kwargs: Any) -> Any:
            return ask(*map(as_float16, args), **{key: as_float16(value) for key, value in kwargs.items()})

        setattr(torch._C, key, answer)


def _tell_triton(capability: tuple[int, int]) -> None:
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    def absent(self: Any, *args: Any) -> Any:
        raise RuntimeError("there is no GPU to measure on")

    class Driver(DriverBase):
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return capability

        def get_device_interface(self) -> Any:
            return torch.cuda

        def map_python_to_cpp_type(self, type: str) -> str:
            return type

        get_benchmarker = get_empty_cache_for_benchmark = clear_cache = absent

    driver.set_active(Driver())
    for asked in vars(_triton).values():  # what was answered, and kept, while there was no GPU
        if hasattr(asked, "cache_clear"):
            asked.cache_clear()


def _choose_attention() -> None:
    """The kernel that a GPU would choose; with fake tensors PyTorch would write attention out as products."""
    aten = torch.ops.aten

    @aten.scaled_dot_product_attention.default.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)
    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16):
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        mask = attn_mask
        if mask is not None and mask.shape[-1] % 8:  # as PyTorch does: the kernel wants its rows aligned
            mask = aten.constant_pad_nd(mask, [0, 8 - mask.shape[-1] % 8])[..., : mask.shape[-1]]
        if mask is not None:
            mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return aten._scaled_dot_product_efficient_attention(q, k, v, mask, False, dropout_p, is_causal, scale=scale)[0]


# ---- reading off


class _Stop(BaseException):
    """The code is written. Not an Exception: nobody shall take it for a failure."""


FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def fake(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    """Both on the GPU that is not there. The model is a copy. A fake tensor has no value, so thresholds that are equal
    become one tensor: what the backend takes for one when it sees the values."""
    known: dict[int, Any] = {}
    thresholds: dict[float, Tensor] = {}

    def twin(tensor: Tensor) -> Tensor:
        with FAKE:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    for tensor in (*model.parameters(), *model.buffers()):
        copied = twin(tensor)
        if tensor.dim() == 0 and tensor.is_floating_point():
            copied = thresholds.setdefault(tensor.item(), copied)
        known[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    return copy.deepcopy(model, known), twin(x)


def kernels(model: nn.Module, x: Tensor, **compile_options: Any) -> list[Kernel]:
    """What a forward pass of the compiled model would launch, in order, without gradients.

    x: the input, real. Raises RuntimeError where Dynamo cuts the model into several graphs.
    """
    found: list[list[Kernel]] = []
    model, x = fake(model, x)
    torch._dynamo.reset()
    with _stopped_after_codegen(found), FAKE, torch.no_grad():
        try:
            torch.compile(model, fullgraph=True, **compile_options)(x)
        except _Stop:
            pass
    (only,) = found
    return only


@contextmanager
def _stopped_after_codegen(found: list[list[Kernel]]) -> Iterator[None]:
    from torch._inductor.graph import GraphLowering

    def compile_to_module(self: GraphLowering) -> Any:
        self.codegen()
        found.append(_merge_outputs([k for node in self.scheduler.nodes if (k := _kernel(node))]))
        raise _Stop

    with mock.patch.object(GraphLowering, "compile_to_module", compile_to_module):
        yield


def _kernel(node: Any) -> Kernel | None:
    """A node of Inductor's schedule as a launch; None for one that launches nothing."""
    from torch._inductor import ir, scheduler
    from torch._inductor.virtualized import V

    if isinstance(node, scheduler.NopKernelSchedulerNode):
        return None
    library = isinstance(node, scheduler.ExternKernelSchedulerNode)
    if isinstance(node, scheduler.SchedulerNode) and node.is_template():
        # A product that nothing is joined with. Inductor would count no more of an operand than the result has.
        reads = {dep.name: _size(V.graph.get_buffer(dep.name)) for dep in node.read_writes.reads}
    else:
        reads = node.get_read_write_buffer_accesses(True, False)
    writes = node.get_read_write_buffer_accesses(False, True)
    ops = tuple(dict.fromkeys(o for part in node.get_nodes() if part.node for o in part.node.get_origins()))
    if library and isinstance(node.node, ir.MultiOutput):  # one of the results of a call that has several
        return Kernel("", True, ops, {}, {node.node.get_name(): _size(node.node)})
    inner = {name for part in node.get_nodes() for name in part.get_buffer_names()}
    reads = {name: size for name, size in reads.items() if name not in inner}
    name = getattr(node.node, "python_kernel_name", None) if library else node.get_name()
    return Kernel(str(name), library, ops, reads, dict(writes))


def _size(buffer: Any) -> int:
    """Bytes."""
    from torch._inductor.virtualized import V

    return V.graph.sizevars.optimization_hint(buffer.get_numel(), fallback=0) * buffer.get_dtype().itemsize


def _merge_outputs(kernels: list[Kernel]) -> list[Kernel]:
    """Give the results of a library call to the call."""
    merged: list[Kernel] = []
    for kernel in kernels:
        if kernel.name or not merged:
            merged.append(kernel)
        else:
            merged[-1].writes.update(kernel.writes)
    return merged


os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
