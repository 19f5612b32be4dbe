"""torch.ops.forged_fx.*: forged functions as operators that every part of PyTorch understands.

    threshold(Tensor x, Tensor t, bool straight_through=False) -> Tensor     0 where |x| < t, else x
    threshold_backward(Tensor grad, Tensor x, Tensor t) -> Tensor            0 where |x| < t, else grad

and in the same way one_sided, shifted, soft (t), clamp (limit), band (t, limit), and mean (mean, width, channel): a
row of `FUNCTIONS` each, from which all that follows is generated.

`kernels/reference.py` specifies them, values and strides. `straight_through` selects the gradient and never
changes the value: False is the true gradient, True the identity (BPDA: Athalye, Carlini, Wagner 2018, arXiv
1802.00420). Parameters get no gradient.

x is float16, bfloat16, float32 or float64, of any shape; a parameter is a floating-point scalar on x's device (of
`mean`, an element for each channel). They are compared in float32 (float64 where x is float64). Anything else is a
TypeError or a ValueError that says what to do.

    CUDA         the Triton kernels of kernels/threshold.py and kernels/kinds.py
    CPU          plain torch: one pass over memory where it has one
    elsewhere    the reference
    Inductor     a pointwise node, which fuses into whatever produces x
"""

import functools
import importlib
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from forged_fx import cpu, torch_internals
from forged_fx.kernels import reference

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

try:
    _library = torch.library.Library("forged_fx", "DEF")
except RuntimeError as error:
    raise ImportError(
        f"{__file__} was imported a second time, now as {__name__!r}, and operators are defined only once: "
        "import it as forged_fx.ops everywhere, and keep its folder itself off sys.path"
    ) from error
# flexible_layout: any layout will do. Without it Inductor, once it has met an op before its lowering was registered,
# would hold its inputs to the strides that they had in eager mode.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


# ---- the table


@dataclass(frozen=True)
class Function:
    """A forged function, of which two operators are made: `name` and `name_backward`.

    name: of its rule in kernels/reference.py, whose gradient is 0 where a value is dropped and 1 where it is kept.
    parameters: names of its tensors. channels: they have an element per channel, and an int `channel` behind them says
    along which dimension of x. cpu, cpu_backward: where there is better than the reference. moves: it does the same to
    every element, leaves 0 as it is and the larger of two values no smaller than the other, so that passes may move it
    past whatever only moves elements about or takes their maximum. told: its
    backward comes to the same from its result as from x, since what is dropped becomes 0, which would be dropped too.
    """

    name: str
    parameters: tuple[str, ...]
    cpu: Callable[..., Tensor] | None = None
    cpu_backward: Callable[..., Tensor] | None = None
    channels: bool = False
    moves: bool = True
    told: bool = False

    @property
    def op(self) -> Any:
        return getattr(torch.ops.forged_fx, self.name).default

    @property
    def backward(self) -> Callable:
        return getattr(torch.ops.forged_fx, f"{self.name}_backward").default

    @property
    def arguments(self) -> int:
        """How many there are besides x (or grad and x) and straight_through."""
        return len(self.parameters) + self.channels

    def schemas(self) -> dict[str, str]:
        rest = ", ".join([*(f"Tensor {p}" for p in self.parameters), *["int channel"] * self.channels])
        return {
            self.name: f"(Tensor x, {rest}, bool straight_through=False) -> Tensor",
            f"{self.name}_backward": f"(Tensor grad, Tensor x, {rest}) -> Tensor",
        }


FUNCTIONS = {
    f.name: f
    for f in (
        Function("threshold", ("t",), cpu.threshold, cpu.threshold_backward, told=True),
        Function("one_sided", ("t",), cpu.one_sided, cpu.one_sided_backward, told=True),
        Function("shifted", ("t",), cpu.shifted, cpu.one_sided_backward),
        Function("soft", ("t",), cpu.soft, cpu.threshold_backward),
        Function("clamp", ("limit",), cpu.clamp, cpu.clamp_backward),
        Function("band", ("t", "limit"), cpu.band, cpu.band_backward),
        Function("mean", ("mean", "width"), channels=True, moves=False),
    )
}
for _function in FUNCTIONS.values():
    for _name, _schema in _function.schemas().items():
        _library.define(_name + _schema, tags=(torch.Tag.pointwise, *TAGS))

# operator, as overload and as packet -> the forged function that it applies
BY_OPERATOR: dict[Callable, Function] = {op: f for f in FUNCTIONS.values() for op in (f.op, f.op.overloadpacket)}

# Every operator that applies a forged function, its parameters from the second argument on, and takes
# `straight_through`; as overload and as packet. The value: how many arguments may come ahead of `straight_through`
# (None: it is a keyword). Other files add theirs.
THRESHOLD_OPS: dict[Callable, int | None] = {op: 1 + f.arguments for op, f in BY_OPERATOR.items()}


# ---- what a caller may pass


def check_function(f: Function, x: Tensor, *arguments: Any) -> None:
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{f.name}: x is {x.dtype}; cast it to one of {known}")
    shape: tuple[int, ...] = ()
    if f.channels:
        channel = arguments[-1]
        if not -x.dim() <= channel < x.dim():
            raise ValueError(f"{f.name}: channel={channel} is no dimension of x, which has {x.dim()}")
        shape = (x.shape[channel],)
    for name, p in zip(f.parameters, arguments, strict=False):
        if not p.is_floating_point() or p.shape != shape:
            wanted = "a floating-point scalar" if not f.channels else f"floating-point, of shape {shape}"
            hint = "pass a 0-dim tensor such as torch.tensor(0.1)" if not f.channels else "an element per channel"
            raise TypeError(f"{f.name}: {name} must be {wanted}, not {p.dtype} of shape {tuple(p.shape)}; {hint}")
        if p.device != x.device:
            raise ValueError(
                f"{f.name}: {name} is on {p.device} and x on {x.device}; move {name} to x's device "
                "(as a buffer of the model it moves along with model.to(...))"
            )


def _check_backward(f: Function, grad: Tensor, x: Tensor, *arguments: Any) -> None:
    check_function(f, x, *arguments)
    if (grad.shape, grad.dtype, grad.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"{f.name}_backward: grad is {grad.dtype} {tuple(grad.shape)} on {grad.device}, and x is "
            f"{x.dtype} {tuple(x.shape)} on {x.device}; they must agree"
        )


# ---- one implementation per device


@functools.cache
def kernels(name: str) -> ModuleType:
    """A file of kernels/."""
    # Late: Triton takes long to import, and not every machine has it.
    return importlib.import_module(f"forged_fx.kernels.{name}")


@functools.cache
def launchers(f: Function) -> tuple[Callable, Callable]:
    """The Triton kernels of a function: forward and backward."""
    if f.name == "threshold":
        file = kernels("threshold")
        return file.launch_threshold, file.launch_threshold_backward
    file = kernels("kinds")
    return functools.partial(file.launch, f.name), functools.partial(file.launch_backward, f.name)


def _implementations(f: Function) -> dict[str, dict[str, Callable]]:
    """Operator -> dispatch key -> what runs there."""
    n = 1 + f.arguments
    plain, plain_backward = getattr(reference, f.name), getattr(reference, f"{f.name}_backward")
    forward, backward = _functions(f)

    def checked(run: Callable) -> Callable:
        def call(*args: Any) -> Tensor:
            args = args[:n]  # all but straight_through
            check_function(f, *args)
            return run(*args)

        return call

    def checked_backward(run: Callable) -> Callable:
        def call(*args: Any) -> Tensor:
            _check_backward(f, *args)
            return run(*args)

        return call

    def autograd(*args: Any) -> Tensor:
        return _record(forward, f.op, *args, *(False,) * (n + 1 - len(args)))

    def autograd_backward(*args: Any) -> Tensor:
        return _record(backward, f.backward, *args)

    _CPU[f.op] = checked(f.cpu or plain)
    _CPU[f.backward] = checked_backward(f.cpu_backward or plain_backward)
    CUDA[f.op] = checked(lambda *args: launchers(f)[0](*args))
    CUDA[f.backward] = checked_backward(lambda *args: launchers(f)[1](*args))
    return {
        f.name: {
            "CPU": _CPU[f.op],
            "CUDA": CUDA[f.op],
            "CompositeExplicitAutograd": checked(plain),
            "Autograd": autograd,
        },
        f"{f.name}_backward": {
            "CPU": _CPU[f.backward],
            "CUDA": CUDA[f.backward],
            "CompositeExplicitAutograd": checked_backward(plain_backward),
            "Autograd": autograd_backward,
        },
    }


def _fakes(f: Function) -> dict[str, Callable]:
    def forward(x: Tensor, *arguments: Any, straight_through: bool = False) -> Tensor:
        check_function(f, x, *arguments[: f.arguments])
        _lower_if_inductor_runs()
        return torch.empty_like(x)

    def backward(grad: Tensor, x: Tensor, *arguments: Any) -> Tensor:
        _check_backward(f, grad, x, *arguments)
        _lower_if_inductor_runs()
        return torch.empty_like(x)

    return {f.name: forward, f"{f.name}_backward": backward}


def _lower_if_inductor_runs() -> None:
    """The fake implementations call this: a compiler consults them before it lowers anything. So plain
    `backend="inductor"` finds the lowerings, and a program that never compiles never imports Inductor."""
    if "torch._inductor.lowering" in sys.modules:
        from forged_fx.lowering import register_lowerings

        register_lowerings()


# ---- gradients


class _Masked(torch_internals.SingleLevelFunction):
    """What both ops do to a gradient or tangent: zero it where x is dropped, or leave it alone (straight-through).

    By hand: what torch.library.register_autograd makes refuses torch.func.grad, and answers forward mode with
    zeros.
    """

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return _mask(ctx, grad), *(None,) * ctx.others

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor | None, *_: Any) -> Tensor | None:
        return None if tangent is None else _mask(ctx, tangent)

    @staticmethod
    def _compiled_autograd_key(ctx: Any) -> tuple:
        return ctx._autograd_function_id, ctx.straight_through, *ctx.channel


def _functions(f: Function) -> tuple[type[_Masked], type[_Masked]]:
    """A function's autograd: of its operator, and of that one's backward."""

    class Forward(_Masked):
        @staticmethod
        def forward(*args: Any) -> Tensor:
            return _run_recorded(f.op, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
            x, *arguments, straight_through = inputs
            # The layer behind keeps the result anyway, and whoever owns x may write to it.
            _keep(ctx, f, output if f.told else x, arguments, straight_through, others=len(inputs) - 1)

    class Backward(_Masked):
        @staticmethod
        def forward(*args: Any) -> Tensor:
            return _run_recorded(f.backward, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
            _, x, *arguments = inputs
            _keep(ctx, f, x, arguments, straight_through=False, others=len(inputs) - 1)

    return Forward, Backward


def _keep(ctx: Any, f: Function, x: Tensor, arguments: list, straight_through: bool, others: int) -> None:
    """x: what the backward is to look at."""
    # Kept even where they are not needed: activation checkpointing runs the forward again, outside of
    # straight_through(), and takes the i-th tensor that is kept then for the i-th that was kept at first.
    n = len(f.parameters)
    ctx.save_for_backward(x, *arguments[:n])
    ctx.save_for_forward(x, *arguments[:n])
    ctx.channel, ctx.others = tuple(arguments[n:]), others
    ctx.backward_op, ctx.straight_through = f.backward, straight_through


def _mask(ctx: Any, value: Tensor) -> Tensor:
    return value if ctx.straight_through else ctx.backward_op(value, *ctx.saved_tensors, *ctx.channel)


def _record(function: type[_Masked], op: Callable, *args: Any) -> Tensor:
    tracked = torch.is_grad_enabled() and torch_internals.any_requires_grad(*args)
    if tracked or torch_internals.in_forward_mode():
        with torch_internals.enable_single_level_autograd_function():
            return function.apply(*args)
    return _run(op, *args)


_CPU: dict[Callable, Callable] = {}
CUDA: dict[Callable, Callable] = {}  # other files add theirs


def direct(op: Callable, x: Tensor, *others: Tensor) -> Callable | None:
    """The implementation that the dispatcher would choose for these tensors: to call it directly saves a third of the
    call. None where the dispatcher must decide, or a mode or transform is to see the call. The caller must know that
    no gradient has to be recorded."""
    tensors = (x, *others)
    if not all(map(is_ordinary, tensors)):
        return None
    is_there, implementations = (is_on_cuda, CUDA) if x.is_cuda else (is_on_cpu, _CPU)
    if not all(map(is_there, tensors)):
        return None
    return None if torch_internals.dispatched() else implementations.get(op)


is_on_cpu, is_on_cuda = operator.attrgetter("is_cpu"), operator.attrgetter("is_cuda")


def is_ordinary(x: Tensor) -> bool:
    """Whether a CPU's or a GPU's tensor is no more than its elements as they lie in memory. (Its dispatch keys would
    say so in one question, which takes three times as long.)"""
    return type(x) in _ORDINARY and x.layout is torch.strided and not x.is_neg()


_ORDINARY = {Tensor, torch.nn.Parameter}


def _direct(op: Callable, args: tuple) -> Callable | None:
    return direct(op, *[arg for arg in args if isinstance(arg, Tensor)])


def _run(op: Callable, *args: Any) -> Tensor:
    if run := _direct(op, args):
        return run(*args)
    with torch_internals.AutoDispatchBelowAutograd():
        return op(*args)


def _run_recorded(op: Callable, *args: Any) -> Tensor:
    if run := _direct(op, args):
        return run(*args)
    # autograd.Function switches both modes off; a torch.func transform further out has yet to record this.
    with torch.enable_grad(), torch_internals.forward_mode_enabled():
        return _run(op, *args)


# ---- torch.func.vmap


def _batch_rule(f: Function, op: Callable, tensors: int) -> Callable:
    """Elementwise, so a batch of x is one bigger x; a batch of parameters, as in an ensemble, takes a call each.

    tensors: how many arguments have x's shape, ahead of the parameters.
    """

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Tensor, int]:
        def member(i: int) -> Tensor:
            pairs = zip(args, in_dims, strict=True)
            return op(*(arg if dim is None else arg.select(dim, i) for arg, dim in pairs))

        def whole(arg: Tensor, dim: int | None) -> Tensor:
            return arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)

        if any(dim is not None for dim in in_dims[tensors : tensors + len(f.parameters)]):
            return torch.stack([member(i) for i in range(info.batch_size)]), 0
        rest = list(args[tensors:])
        if f.channels and rest[len(f.parameters)] >= 0:
            rest[len(f.parameters)] += 1  # the batch comes first
        return op(*map(whole, args[:tensors], in_dims), *rest), 0

    return rule


# ---- exporters that know standard operators only


def _standard(f: Function) -> dict[Callable, Callable]:
    """Both operators in standard ones."""

    def decide(x: Tensor, *arguments: Any) -> tuple:
        wide = reference.comparison_dtype(x.dtype)
        parameters = [p.to(wide) for p in arguments[: len(f.parameters)]]
        if f.channels:
            parameters = [reference.per_channel(p, x, arguments[len(parameters)]) for p in parameters]
        value = x.to(wide)
        dropped, instead, kept = reference.RULES[f.name](torch, value, *parameters)
        return dropped, instead, x if kept is value else kept.to(x.dtype)

    def forward(x: Tensor, *arguments: Any, straight_through: bool = False) -> Tensor:
        dropped, instead, kept = decide(x, *arguments)
        return torch.where(dropped, instead.to(x.dtype) if isinstance(instead, Tensor) else instead, kept)

    def backward(grad: Tensor, x: Tensor, *arguments: Any) -> Tensor:
        return torch.where(decide(x, *arguments)[0], 0, grad)

    return {f.op: forward, f.backward: backward}


# Operator -> the same in more basic ones. Other files add theirs.
DECOMPOSITIONS: dict[Callable, Callable] = {}


def decompositions() -> dict[Any, Callable]:
    """This library's operators in standard ones, for `torch.export.ExportedProgram.run_decompositions`.

    program = torch.export.export(forged, (x,)).run_decompositions(forged_fx.decompositions())
    torch.onnx.export(program).save("forged.onnx")
    """
    return DECOMPOSITIONS | {op: run for f in FUNCTIONS.values() for op, run in _standard(f).items()}


# ---- registration

IMPLEMENTATIONS: dict[str, dict[str, Callable]] = {}
for _function in FUNCTIONS.values():
    IMPLEMENTATIONS |= _implementations(_function)
    for _name, _fake in _fakes(_function).items():
        for _key, _implementation in IMPLEMENTATIONS[_name].items():
            _library.impl(_name, _implementation, _key)
        torch.library.register_fake(f"forged_fx::{_name}", _fake, lib=_library)
        _op, _tensors = getattr(torch.ops.forged_fx, _name).default, 1 + _name.endswith("_backward")
        torch.library.register_vmap(f"forged_fx::{_name}", _batch_rule(_function, _op, _tensors), lib=_library)
