"""What of PyTorch is used that PyTorch does not promise to keep. Written for torch 2.14; 2.11 is the oldest.

No other file of the library reaches for a private name. `NAMES` lists them: tests/test_torch_internals.py says of a new
release which of them it moved. Below are first the names that are used as they are, then the parts of the compiler that
the backend touches, one function each; tests/test_backend.py runs them.
"""

import copy
import functools
import math
import re
import sys
import types
import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.fx as fx
import torch.nn.attention
import torch.utils.checkpoint
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function as enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

OLDEST = (2, 11)

VERSION = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
if VERSION < OLDEST:
    raise ImportError(
        f"forged_fx needs PyTorch {OLDEST[0]}.{OLDEST[1]} or newer, and this is {torch.__version__}: "
        "pip install --upgrade torch"
    )

# private name -> what it does here
NAMES = {
    # operators, eager
    "torch._C._AutoDispatchBelowAutograd": "runs an operator below autograd",
    "torch._C.DisableTorchFunctionSubclass": "does to a tensor of ours what is done to any",
    "torch._C._any_requires_grad": "asks whether a call has to be recorded for the backward",
    "torch._functorch.utils.enable_single_level_autograd_function": "lets the operators' autograd functions be applied",
    "torch.autograd.function._SingleLevelFunction": "is the base of the operators' autograd functions",
    "torch.overrides._get_current_function_mode_stack": "finds modes that want to see the operators",
    "torch.overrides._pop_mode": "takes a caller's modes off, so that they do not reach in",
    "torch.overrides._push_mode": "puts them back",
    "torch._dynamo.variables.torch_function.torch_function_mode_stack_state_mgr": "has the modes that Dynamo took off",
    "torch._C._functorch.maybe_current_level": "tells whether torch.func transforms are at work",
    "torch._C._functorch.TransformType.Jvp": "tells forward-mode differentiation where Dynamo's graph began it",
    "torch._C._functorch.get_interpreter_stack": "lists the torch.func transforms at work",
    "torch._C._functorch.get_unwrapped": "tells what torch.vmap was given from what it makes of it",
    "torch._C._functorch.is_functorch_wrapped_tensor": "tells tensors within torch.vmap, which cannot be measured",
    "torch._C._len_torch_dispatch_stack": "tells whether dispatch modes are at work",
    "torch._C._len_torch_function_stack": "tells whether function modes are at work",
    "torch._C._storage_Use_Count": "counts who holds a tensor's memory, before it is written to in place",
    "torch.fx._symbolic_trace.is_fx_symbolic_tracing": "tells whether a model is being traced",
    "torch.fx.graph_module._forward_from_src": "makes a function of a graph's code",
    # calibration and regions
    "torch._C._set_grad_enabled": "is the call by which a model changes the grad mode in its forward",
    "torch._C._current_graph_task_id": "tells one backward's recomputation from another's",
    "torch._grouped_mm": "is a product that may be a site",
    "torch._foreach_add_": "adds a number to each of many tensors, in one kernel on a GPU",
    "torch.nn.Module._call_impl.__code__": "is the frame of a module's call, on the stack",
    "torch.nn.Module._wrapped_call_impl.__code__": "is that of a module that was compiled in place",
    "torch.utils._python_dispatch.TorchDispatchMode": "counts the thresholds that run",
    "torch.utils._pytree.tree_leaves": "lists the tensors in a model's arguments",
    "torch.utils._pytree.tree_map": "maps the tensors in a model's arguments",
    # processes
    "torch.distributed.distributed_c10d._get_default_store": "is where processes find each other before they connect",
    # graphs
    "torch.nn.utils.parametrize._cache_enabled": "tells whether parametrizations are computed once for several calls",
    "torch._assert": "stands in captured graphs for assertions",
    "torch.nn.attention._sdpa_kernel.__name__": "chooses attention's kernels, which a graph would not do",
    "torch.fx._symbolic_trace._assert_is_none": "is what concrete arguments leave in a graph",
    "torch._ops.OpOverload": "is an operator, which says whether it writes",
    "torch._ops.OpOverloadPacket": "is an operator by the name of all its overloads",
    "torch.nn.modules.module._has_any_global_hook": "tells whether a module may be called past its __call__",
    # the compiler
    "torch._TorchCompileWrapper": "is how torch.compile holds a backend",
    "torch._dynamo.backends.common.aot_autograd": "makes the graph of ATen calls that costs are read from",
    "torch._dynamo.config": "says how often Dynamo compiles one code",
    "torch._dynamo.eval_frame.OptimizedModule": "is a compiled module, whose calls are checked",
    "torch._dynamo.eval_frame.innermost_backend": "finds the backend of a compiled module",
    "torch._dynamo.exc.BackendCompilerFailed": "is how a missing C++ compiler shows",
    "torch._dynamo.guards.GuardBuilder": "compiles anew for another module",
    "torch._dynamo.guards.install_guard": "compiles anew for another module, or other thresholds",
    "torch._dynamo.source.AttrSource": "tells what is kept in modules from what comes in through arguments",
    "torch._dynamo.source.GlobalSource": "tells global tensors from what comes in through arguments",
    "torch._dynamo.source.ConstantSource": "says where a threshold in a graph comes from",
    "torch._functorch.aot_autograd.make_boxed_func": "runs the graph of ATen calls as it is",
    "torch._inductor.compile_fx.compile_fx": "is Inductor",
    "torch._inductor.compile_fx.compile_fx_inner": "is Inductor, behind autograd",
    "torch._inductor.config": "says whether Inductor rounds as eager mode does",
    "torch._inductor.custom_graph_pass.CustomGraphPass": "is the base of our pass over Inductor's graph",
    "torch._inductor.decomposition.select_decomp_table": "has what Inductor takes apart, fused operators of ours too",
    "torch._inductor.inductor_prims._low_memory_max_pool_with_offsets": "is a max pool in Inductor's graphs",
    "torch._inductor.ir.FlexibleLayout": "is that of a tensor whose order in memory is not settled yet",
    "torch._inductor.ir.as_storage_and_layout": "settles the order of a tensor in memory",
    "torch._inductor.ir.get_stride_order": "tells the order of a tensor in memory by its strides",
    "torch._inductor.ir.is_storage_and_layout": "tells whether a tensor's order in memory can be settled",
    "torch._inductor.ir.Pointwise": "is the node that a threshold becomes",
    "torch._inductor.list_mode_options": "has what a mode of torch.compile stands for",
    "torch._inductor.list_options": "has Inductor's own options",
    "torch._inductor.lowering.fallback_handler": "leaves a threshold the call that it is",
    "torch._inductor.lowering.register_lowering": "makes a threshold a pointwise node; its file tells library calls",
    "torch._inductor.virtualized.V": "has the graph that code is generated for, and the choices that are made",
    "torch._inductor.virtualized.ops": "has the arithmetic of generated code",
}

AutoDispatchBelowAutograd = torch._C._AutoDispatchBelowAutograd
any_requires_grad = torch._C._any_requires_grad
current_graph_task_id = torch._C._current_graph_task_id
set_grad_enabled = torch._C._set_grad_enabled
as_plain_tensors = torch._C.DisableTorchFunctionSubclass
assertion = torch._assert
CHOOSE_ATTENTION = torch.nn.attention._sdpa_kernel.__name__
assert_is_none = torch.fx._symbolic_trace._assert_is_none
function_modes = torch.overrides._get_current_function_mode_stack
has_any_global_hook = torch.nn.modules.module._has_any_global_hook
MODULE_CALL = torch.nn.Module._call_impl.__code__
WRAPPED_CALL = torch.nn.Module._wrapped_call_impl.__code__
SingleLevelFunction = torch.autograd.function._SingleLevelFunction
grouped_mm = torch._grouped_mm
add_to_each = torch._foreach_add_

# runs whatever is checkpointed, in both variants; in torch 2.13 that is the function itself
_run_checkpoint = (
    getattr(torch.utils.checkpoint, "_checkpoint_impl", None) or torch.utils.checkpoint.checkpoint.__wrapped__
)
CHECKPOINT = _run_checkpoint.__code__


@functools.cache
def inductor() -> types.SimpleNamespace:
    """What lowerings and the backend use of Inductor, imported when it is first asked for: that takes seconds."""
    from torch._inductor import config, decomposition, list_mode_options, list_options
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.ir import (
        FlexibleLayout,
        Pointwise,
        as_storage_and_layout,
        get_stride_order,
        is_storage_and_layout,
    )
    from torch._inductor.lowering import fallback_handler, register_lowering
    from torch._inductor.virtualized import V, ops

    return types.SimpleNamespace(
        FlexibleLayout=FlexibleLayout,
        Pointwise=Pointwise,
        V=V,
        as_storage_and_layout=as_storage_and_layout,
        compile_fx=compile_fx,
        compile_fx_inner=compile_fx_inner,
        config=config,
        decomposition=decomposition,
        fallback_handler=fallback_handler,
        get_stride_order=get_stride_order,
        is_storage_and_layout=is_storage_and_layout,
        list_mode_options=list_mode_options,
        list_options=list_options,
        ops=ops,
        register_lowering=register_lowering,
    )


def compiler_error() -> type[Exception]:
    """What torch.compile raises where a backend fails."""
    from torch._dynamo.exc import BackendCompilerFailed

    return BackendCompilerFailed


def modes_that_dynamo_took_off() -> list[Any]:
    """Function modes that are active although they are not on the stack: Dynamo compiles within them."""
    if "torch._dynamo" not in sys.modules:
        return []
    from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr

    return torch_function_mode_stack_state_mgr.stack


@contextmanager
def without_function_modes(kind: type) -> Iterator[None]:
    """Off the stack, so that what is compiled within is guarded as if they had not been entered; others stay."""
    found = function_modes()
    _stack([mode for mode in found if not isinstance(mode, kind)])
    try:
        yield
    finally:
        _stack(found)


def _stack(modes: list[Any]) -> None:
    while function_modes():
        torch.overrides._pop_mode()
    for mode in modes:
        torch.overrides._push_mode(mode)


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is at work. (A graph of Dynamo's begins torch.func.jvp past Python.)"""
    if forward_ad._current_level >= 0:
        return True
    transforms = torch._C._functorch.get_interpreter_stack()  # mostly None, and this is asked for in each run
    return bool(transforms) and any(t.key() == torch._C._functorch.TransformType.Jvp for t in transforms)


def forward_mode_enabled() -> AbstractContextManager:
    """Within it, forward-mode differentiation records."""
    return forward_ad._set_fwd_grad_enabled(True)


def store_of_processes() -> Any:
    """Where processes that belong together find each other before they connect."""
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether it went through `Module.compile`."""
    return module._compiled_call_impl is not None


def checkpoints() -> tuple[list[dict], dict | None]:
    """The activation checkpoints that are running this code, innermost first, as a place for notes each.

    Those in their first run, up to the first that is recomputed in a backward, and that one. A checkpoint finds its
    notes again when it is recomputed, and keeps one more place for each backward.
    """
    from torch.utils.checkpoint import CheckpointFunction

    first: list[dict] = []
    for frame in frames():
        code, owner = frame.f_code, None
        if code is CheckpointFunction.forward.__code__:
            owner = frame.f_locals["ctx"]
        elif code is CHECKPOINT and "gen" in frame.f_locals:
            generator = frame.f_locals["gen"].gi_frame
            owner = generator and generator.f_locals.get("new_frame")  # without gradients there is none
        elif code is CheckpointFunction.backward.__code__:
            return first, vars(frame.f_locals["ctx"]).setdefault("forged_fx", {})
        elif code.co_qualname == "_checkpoint_hook.__init__.<locals>.unpack_hook":
            return first, vars(frame.f_locals["frame"]).setdefault("forged_fx", {})
        if owner is not None:
            first.append(vars(owner).setdefault("forged_fx", {}))
    return first, None


def memory_of(tensor: torch.Tensor) -> int | None:
    """The address of a tensor's storage; None of one without, or of a kind that has none of its own (a sparse one)."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):
        return None


def checkpoints_itself(module: torch.nn.Module) -> bool:
    """Whether a checkpoint that the module's own forward has begun is running this code."""
    for frame in frames():
        if frame.f_code is CHECKPOINT:
            return True
        if frame.f_code is MODULE_CALL and frame.f_locals["self"] is module:
            return False
    return False


def functions() -> list[type[torch.autograd.Function]]:
    """Every torch.autograd.Function with a forward of its own, but for that of checkpoints, whose backward is that of
    the calls within. (Who keeps `Function.apply` under a name of his own still runs that forward.)"""
    from torch.utils.checkpoint import CheckpointFunction

    found: list[type[torch.autograd.Function]] = []
    waiting = torch.autograd.Function.__subclasses__()
    while waiting:
        function = waiting.pop()
        waiting += function.__subclasses__()
        if "forward" in vars(function) and function is not CheckpointFunction:
            found.append(function)
    return found


def forwards_of_functions() -> set[types.CodeType]:
    """The code of their forwards."""
    return {code for function in functions() if (code := getattr(function.forward, "__code__", None)) is not None}


def parametrizations_are_kept() -> bool:
    """Whether this is within torch.nn.utils.parametrize.cached()."""
    return torch.nn.utils.parametrize._cache_enabled > 0


def running(codes: Container[types.CodeType]) -> types.CodeType | None:
    """The innermost of these that is running this code; None if none is."""
    return next((frame.f_code for frame in frames() if frame.f_code in codes), None)


def modules_on_stack(in_hooks: bool = True) -> Iterator[torch.nn.Module]:
    """The modules whose forward is running now, innermost first. Dynamo compiles a frame while it waits to run.

    in_hooks: those too whose forward is through, and whose own forward hooks run.
    """
    for frame in frames():
        called = frame.f_code is MODULE_CALL
        # What went through `Module.compile` may have no frame of its own beyond this one: its call is what is compiled.
        if called or (frame.f_code is WRAPPED_CALL and compiled_in_place(frame.f_locals["self"])):
            held = frame.f_locals
            if in_hooks or held.get("result") is None:
                yield getattr(held["self"], "_orig_mod", held["self"])


def at_end_of_call() -> list[Callable[[], None]] | None:
    """What will be run when the compiled call that is in progress is through; what one of them raises, the call raises.

    Dynamo's wrapper of a compiled callable keeps this list for the state that it restores; each call has its own.
    """
    for frame in frames():
        if frame.f_code.co_name == "compile_wrapper" and "cleanups" in frame.f_locals:
            return frame.f_locals["cleanups"]
    return None


def around_calls_of_compiled_modules(
    concerns: Callable[[Callable, dict[str, Any]], Any], watch: Callable[[torch.nn.Module, Any], Callable[[], None]]
) -> None:
    """Ask `concerns(backend, its keyword arguments)` of each compiled module, once. Where it returns something,
    call `watch(module, that)` ahead of each call of the module, and what it returns after the call.

    Where Dynamo gives a frame up before it has a graph, it runs it plain and never calls the backend: this is the only
    place left to notice.
    """
    from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

    plain = OptimizedModule.__call__

    def concern(context: Any) -> Any:
        wrapper = innermost_backend(context.callback)
        ours = isinstance(wrapper, torch._TorchCompileWrapper)
        return concerns(wrapper.compiler_fn, wrapper.kwargs) if ours else None

    @functools.wraps(plain)
    def call(self: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # within another compiled call, which Dynamo looks into
            return plain(self, *args, **kwargs)
        known = vars(self.dynamo_ctx)
        if "forged_fx" not in known:
            known["forged_fx"] = concern(self.dynamo_ctx)
        if known["forged_fx"] is None:
            return plain(self, *args, **kwargs)
        check = watch(self._orig_mod, known["forged_fx"])
        result = plain(self, *args, **kwargs)
        check()
        return result

    OptimizedModule.__call__ = call


def frames() -> Iterator[types.FrameType]:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def module_ids(node: fx.Node) -> list[int]:
    """id() of the modules that a node of Dynamo's graph was recorded in, innermost first, from the frame downwards.

    The names beside them are relative to the frame, hence wrong after a graph break; the keys hold the ids.
    """
    return [int(key.partition("@")[0]) for key in reversed(node.meta.get("nn_module_stack") or {})]


def lifted_value(node: fx.Node) -> Any:
    """The tensor that a placeholder of Dynamo's graph stood for when it was compiled, a Parameter among them."""
    return getattr(node.meta.get("grapharg"), "example", None)


def declare_buffer(gm: fx.GraphModule, name: str) -> None:
    """Tell AOTAutograd where a buffer that Dynamo did not make came from."""
    from torch._dynamo.source import ConstantSource

    gm._param_name_to_source[name] = ConstantSource(name)


def twin(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph that may be given more inputs: Dynamo goes on to read its own."""
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, known))
    for old, new in known.items():
        if old.op == "placeholder":
            new._dynamo_source = old._dynamo_source
    copied = fx.GraphModule(gm, graph)
    copied.meta.update(gm.meta)
    for name, value in vars(gm).items():
        vars(copied).setdefault(name, value)
    return copied


def add_input(gm: fx.GraphModule, name: str) -> fx.Node:
    """One more input of Dynamo's graph, after the others. Whoever runs the compiled graph passes it."""
    from torch._dynamo.source import ConstantSource

    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        node = gm.graph.placeholder(name)
    node._dynamo_source = ConstantSource(name)
    return node


def guard_identity(gm: fx.GraphModule) -> None:
    """Compile the frame anew for each object that its parameters come from.

    Dynamo lets two modules of one class share compiled code: their parameters are inputs. Their thresholds are not.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    owners = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(lifted_value(node), torch.nn.Parameter):
            *_, root = _path(node.meta["grapharg"].source)  # a local or a global variable of the frame
            owners[root.name] = root
    for root in owners.values():
        install_guard(root.make_guard(GuardBuilder.ID_MATCH))


def guard_equal(a: fx.Node, b: fx.Node) -> None:
    """Compile the frame anew once two scalar tensors, inputs of Dynamo's graph, no longer hold the same number.

    On a device, which a look would have to wait for, their values are looked at after they were written to only.
    """
    first, second = (weakref.ref(lifted_value(node)) for node in (a, b))
    on_cpu = lifted_value(a).device.type == "cpu"
    known: dict[tuple[int, int], bool] = {}

    def equal() -> bool:
        one, two = first(), second()
        if on_cpu:
            return one.item() == two.item()
        versions = (one._version, two._version)
        if versions not in known:
            known.clear()
            known[versions] = one.item() == two.item()
        return known[versions]

    sources = [node.meta["grapharg"].source for node in (a, b)]
    for source, tensor in zip(sources, (first, second), strict=True):
        _guard(source, lambda value, tensor=tensor: value is tensor(), "the threshold is the same tensor")
    # At the root: what is within a module, torch 2.11 looks at only once one of its dictionaries has changed.
    _guard(sources[0], lambda _: equal(), "it equals another threshold", at_root=True)


def is_local(node: fx.Node) -> bool:
    """Whether a placeholder of Dynamo's graph stands for a local variable of the frame, or for an item of one that is
    no module: what comes in through arguments. Not so for globals, and for what is kept in modules."""
    from torch._dynamo.source import AttrSource, GlobalSource

    source = getattr(node.meta.get("grapharg"), "source", None)
    return not any(isinstance(step, AttrSource | GlobalSource) for step in _path(source))


def _path(source: Any) -> Iterator[Any]:
    """Dynamo's path to a value, from the value back to the variable of the frame that it starts from."""
    yield source
    while hasattr(source, "base"):
        yield (source := source.base)


def _guard(source: Any, holds: Callable[[Any], bool], text: str, at_root: bool = False) -> None:
    """Compile the frame anew once `holds` is no longer true of what `source` leads to; or, `at_root`, of the frame."""
    from torch._dynamo.guards import install_guard

    def create(builder: Any, guard: Any) -> None:
        manager = builder.guard_manager.root if at_root else builder.get_guard_manager(guard)
        manager.add_lambda_guard(holds, [f"{text}: {guard.name}"], guard.user_stack)

    install_guard(source.make_guard(create))


def inline_opened(gm: fx.GraphModule, node: fx.Node, opened: Callable) -> None:
    """Replace one call in Dynamo's graph by what it does, recorded ahead of autograd and autocast."""
    from torch.fx.experimental.proxy_tensor import make_fx

    inputs = list(dict.fromkeys(node.all_input_nodes))
    values = [n.meta["example_value"] for n in inputs]

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
        return opened(*args, **kwargs)

    with values[0].fake_mode:  # the one that Dynamo traced with; the tracing context holds another by now
        inner = make_fx(run, pre_dispatch=True)(*values)
    known = dict(zip(inner.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for attribute in inner.graph.find_nodes(op="get_attr"):
        setattr(gm, f"{node.name}_{attribute.target}", getattr(inner, attribute.target))
        attribute.target = f"{node.name}_{attribute.target}"
    with gm.graph.inserting_before(node):
        results = gm.graph.graph_copy(inner.graph, known)
    for old, new in known.items():
        if old.op != "placeholder":
            new.meta = {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
            new.meta["example_value"] = old.meta.get("val")
    for user in list(node.users):  # the composition returns a tuple, so that each user takes an item of it
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def graph_pass(run: Callable[[fx.Graph], None], version: bytes) -> Any:
    """A pass for Inductor's graph of ATen calls. `version` becomes a part of Inductor's cache key, which covers neither
    a pass nor a lowering's body by itself: without it, what an older version made would be served from the cache."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class Pass(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            run(graph)

        def uuid(self) -> bytes:
            return version

    return Pass()


def many_compilations() -> AbstractContextManager:
    """Within it, Dynamo compiles a code as often as it is asked to."""
    from torch._dynamo import config

    return config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize)


def on_inductors_graph(gm: fx.GraphModule, inputs: list[Any], read: Callable[[fx.Graph], None]) -> Callable:
    """Show `read` a copy of the graph of ATen calls that Inductor would get for Dynamo's graph; what runs the graph."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.decomposition import select_decomp_table

    def compiler(graph: fx.GraphModule, inputs: list[Any]) -> Callable:
        read(copy.deepcopy(graph.graph))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table())(gm, inputs)


def _adapts_by_wide_windows(node: fx.Node) -> bool:
    """Whether a pool to a given size has windows of several sizes, and more than 25 values in one. (Else Inductor makes
    a pool with a stride of it.)"""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    sizes = list(zip(node.args[0].meta["val"].shape[-2:], node.args[1], strict=True))
    wide = math.prod((before + after - 1 + after - 1) // after for before, after in sizes) > 25
    return statically_known_true(wide) and not all(statically_known_true(b % a == 0) for b, a in sizes)


def _averages_wide_windows(node: fx.Node) -> bool:
    """Whether windows of more than 25 values overlap, or leave something out."""
    _, kernel, stride = (*node.args, None)[:3]
    return math.prod(kernel) > 25 and list(stride or kernel) != list(kernel)


def _is_not_decomposed(node: fx.Node) -> bool:
    """Whether what sorts is left as it is, which is the default."""
    from torch._inductor import config

    return not getattr(config.triton, "decompose_sort_ops", False)


aten = torch.ops.aten
# What Inductor writes itself, or leaves to PyTorch -> when it leaves it.
_LEFT_TO_PYTORCH: dict[Any, Callable[[fx.Node], bool]] = {
    # on a GPU, a bias is added by a kernel of Inductor's
    aten.convolution.default: lambda node: node.args[2] is None or node.meta["val"].device.type == "cpu",
    aten._adaptive_avg_pool2d.default: _adapts_by_wide_windows,
    aten.adaptive_max_pool2d.default: _adapts_by_wide_windows,
    aten.avg_pool2d.default: _averages_wide_windows,
    aten.sort.default: lambda node: node.meta["val"][0].device.type == "cpu",
    aten.sort.stable: lambda node: node.meta["val"][0].device.type == "cpu",
    aten.topk.default: _is_not_decomposed,
    aten.kthvalue.default: _is_not_decomposed,
    aten.median.default: _is_not_decomposed,
    aten.median.dim: _is_not_decomposed,
    aten.mode.default: _is_not_decomposed,
}


def is_library_call(node: fx.Node) -> bool:
    """Whether Inductor leaves an ATen call to a library's kernel, or to one of PyTorch's own."""
    from torch._inductor import lowering

    if node.target in _LEFT_TO_PYTORCH:
        return _LEFT_TO_PYTORCH[node.target](node)
    products = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
    return node.target in products or node.target in lowering.fallbacks or node.target not in lowering.lowerings


@functools.cache
def max_pools() -> frozenset[Callable]:
    """Inductor's calls that give the largest values of windows, and where they are."""
    from torch._inductor.inductor_prims import _low_memory_max_pool_with_offsets

    pools = "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d"
    return frozenset((_low_memory_max_pool_with_offsets, *(getattr(aten, pool).default for pool in pools)))


def choosing(wrap: Callable[[Any], Any]) -> AbstractContextManager:
    """Within it, Inductor's choices are what `wrap` makes of those that it would make."""
    from torch._inductor.virtualized import V

    return V.set_choices_handler(wrap(V.choices))


def offered_as_prologue(node: Any) -> bool:
    """Whether a node of Inductor's schedule is on its list of prologues worth a try."""
    from torch._inductor.virtualized import V

    return node.get_operation_names() <= V.graph.invoke_quant_ops


def forward_of(graph: fx.Graph) -> Callable:
    """The function that a graph module of this graph would have as its forward."""
    from torch.fx.graph_module import _forward_from_src

    code = graph.python_code("self")
    return _forward_from_src(code.src, code.globals)


def is_vmapped(x: Tensor) -> bool:
    """Whether the tensor is one that a torch.func transform has made for the function that it runs."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def unwrapped_once(x: Tensor) -> Tensor:
    """What a torch.func transform has made such a tensor of."""
    return torch._C._functorch.get_unwrapped(x)


def dispatched() -> bool:
    """Whether a dispatch mode or a torch.func transform is to see what runs below autograd."""
    return bool(torch._C._len_torch_dispatch_stack()) or torch._C._functorch.maybe_current_level() is not None


def watched() -> bool:
    """Whether anything besides the caller is to see what runs now: a mode, a torch.func transform, a tracer."""
    return bool(
        torch._C._len_torch_function_stack()
        or dispatched()
        or in_forward_mode()
        or torch.jit.is_tracing()
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
    )


def schemas_of(target: Any) -> list[Any]:
    """What an operator says of its arguments, one for each overload that may be meant; nothing of other calls."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [getattr(target, overload)._schema for overload in target.overloads()]
    return [target._schema] if isinstance(target, torch._ops.OpOverload) else []


def owners(x: Tensor) -> tuple[int, int, int]:
    """How many hold this tensor within PyTorch, and how many its memory, there and in Python."""
    memory = x.untyped_storage()
    return x._use_count(), torch._C._storage_Use_Count(memory._cdata), sys.getrefcount(memory)
