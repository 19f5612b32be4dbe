"""What a site is, and which calls can be one.

A *site* is a call of a linear, convolution or matrix-product function in which data meets weights: exactly one side is
data (it depends on the model's input), the other is made from parameters alone. The threshold goes on the data.

Calls of activation functions (`ACTIVATIONS`) can be sites as well, where that is asked for.

A site is named after the innermost module that runs the call, as `named_modules()` spells it. The k-th call in that
module within one forward pass carries `#k`, counted from 0; the first of a named module goes without. So
`layer1.0.conv1` is that layer's only call, `head.fc#1` the second use of a shared layer, `attn#2` the third product in
an attention module's own code, `#0` the first call in the root module's own code. Every call of the table counts,
site or not, so that a name does not depend on how its operands were classified. Activations are counted apart, and
always carry their number: `layer1.0.relu@0` is the first call of that module, `layer1.0.relu@1` its second.

To add a kind of layer, add a row to `CALLS`; an activation function, to `_FAMILIES`.
"""

import functools
import operator
import re
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from forged_fx import torch_internals

Key = tuple[int | str, ...]  # where an operand sits in a call: (3,), ("weight",), or (1, 0) inside a list argument


class Origin(IntEnum):
    """What a value was made from. A bit each, so that a result's is `joined` from its inputs'."""

    CONSTANT = 0  # buffers, literals, factory functions
    PARAMETER = 1  # at least one parameter, no data
    UNKNOWN = 2  # where it comes from was not seen: a global tensor, an item of a list, numbers from Python or numpy
    MIXED = 3  # parameters and the unknown
    DATA = 4  # depends on the model's input


_ORIGINS = [*Origin]


def joined(*origins: Origin) -> Origin:
    """That of what is made from values of these origins: `DATA` whatever comes to it."""
    bits = 0
    for origin in origins:
        bits |= origin
    return _ORIGINS[min(bits, Origin.DATA)]


@dataclass(frozen=True)
class Call:
    """How to read one function's call: its kind, and where its operands are.

    roles: a letter per operand; "x" is always data, "w" always the weight, "?" is a product's operand, either one; "a"
    is an activation's. channel: which dimension of the data holds the channels, from behind; None: the second. right:
    the same of a second operand that is data.
    """

    kind: str
    roles: str
    keys: tuple[tuple[int, str], ...]  # per operand: its position, its keyword
    opens: bool = True  # False: a fused kernel whose inside cannot be reached
    channel: int | None = -1
    right: int = -1

    @property
    def mark(self) -> str:
        """What stands ahead of the number in a site's name."""
        return "@" if self.roles == "a" else "#"

    def channel_of(self, value: Tensor, key: Key = ()) -> int:
        """Where the channels of an operand lie, which sits at `key`; or of the result."""
        if value.dim() > 1 and self.right != self.channel and key in ((self.keys[1][0],), (self.keys[1][1],)):
            return self.right
        return 1 - value.dim() if self.channel is None else self.channel

    def operands(self, args: tuple, kwargs: dict) -> list[tuple[str, Key, Any]]:
        found: list[tuple[str, Key, Any]] = []
        for role, (position, keyword) in zip(self.roles, self.keys, strict=True):
            if keyword in kwargs:
                found.append((role, (keyword,), kwargs[keyword]))
            elif position < len(args):
                found.append((role, (position,), args[position]))
        return found


@dataclass(frozen=True)
class Many(Call):
    """`einsum(equation, *operands)`, or with the operands in one list. first: the position of the first operand."""

    first: int = 1

    def operands(self, args: tuple, kwargs: dict) -> list[tuple[str, Key, Any]]:
        found: list[tuple[str, Key, Any]] = []
        for i, value in enumerate(args[self.first :], start=self.first):
            nested = isinstance(value, list | tuple)
            found += [("?", (i, j), v) for j, v in enumerate(value)] if nested else [("?", (i,), value)]
        return found


def _layer(kind: str, channel: int | None = -1) -> Call:
    return Call(kind, "xw", ((0, "input"), (1, "weight")), channel=channel)


def _activation(kind: str) -> Call:
    return Call(kind, "a", ((0, "input"),))


def _product(kind: str, first: int, a: str, b: str, right: int = -2) -> Call:
    """right: the dimension of the second operand that is summed over."""
    return Call(kind, "??", ((first, a), (first + 1, b)), right=right)


def _aten(rows: dict[str, Call]) -> dict[Callable, Call]:
    """For each operator by name: itself, and its overloads that have these operands and make their own result."""
    found: dict[Callable, Call] = {}
    for name, call in rows.items():
        packet = getattr(torch.ops.aten, name)
        for overload in (getattr(packet, o) for o in packet.overloads()):
            arguments = [argument.name for argument in overload._schema.arguments]
            if "out" not in arguments and all(arguments[p : p + 1] == [keyword] for p, keyword in call.keys):
                found[overload] = call
        found[packet] = call
    return found


_BILINEAR = Call("bilinear", "xxw", ((0, "input1"), (1, "input2"), (2, "weight")))
_RECURRENT = Call("recurrent", "x", ((0, "input"),), opens=False)

# One row per function. A method is listed as the function that `torch.Tensor` holds.
CALLS: dict[Callable, Call] = {
    F.linear: _layer("linear"),
    F.conv1d: _layer("conv1d", -2),
    F.conv2d: _layer("conv2d", -3),
    F.conv3d: _layer("conv3d", -4),
    F.conv_transpose1d: _layer("conv_transpose1d", -2),
    F.conv_transpose2d: _layer("conv_transpose2d", -3),
    F.conv_transpose3d: _layer("conv_transpose3d", -4),
    F.bilinear: _BILINEAR,
    torch.bilinear: _BILINEAR,
    torch.matmul: _product("matmul", 0, "input", "other"),
    torch.linalg.matmul: _product("matmul", 0, "input", "other"),
    Tensor.matmul: _product("matmul", 0, "self", "other"),
    Tensor.__matmul__: _product("matmul", 0, "self", "other"),
    Tensor.__rmatmul__: Call("matmul", "??", ((0, "self"), (1, "other")), channel=-2),
    operator.matmul: _product("matmul", 0, "a", "b"),
    torch.mm: _product("mm", 0, "input", "mat2"),
    Tensor.mm: _product("mm", 0, "self", "mat2"),
    torch.sparse.mm: _product("mm", 0, "sparse", "dense"),
    torch.mv: _product("mv", 0, "input", "vec"),
    Tensor.mv: _product("mv", 0, "self", "vec"),
    torch.bmm: _product("bmm", 0, "input", "mat2"),
    Tensor.bmm: _product("bmm", 0, "self", "mat2"),
    torch.addmm: _product("addmm", 1, "mat1", "mat2"),
    Tensor.addmm: _product("addmm", 1, "mat1", "mat2"),
    torch.baddbmm: _product("baddbmm", 1, "batch1", "batch2"),
    Tensor.baddbmm: _product("baddbmm", 1, "batch1", "batch2"),
    torch.tensordot: _product("tensordot", 0, "a", "b", right=-1),
    torch.inner: _product("inner", 0, "input", "other", right=-1),
    Tensor.inner: _product("inner", 0, "self", "other", right=-1),
    torch.dot: _product("dot", 0, "input", "tensor", right=-1),
    Tensor.dot: _product("dot", 0, "self", "tensor", right=-1),
    torch.vdot: _product("vdot", 0, "input", "other", right=-1),
    Tensor.vdot: _product("vdot", 0, "self", "other", right=-1),
    torch.linalg.vecdot: _product("vecdot", 0, "x", "y", right=-1),
    torch.addmv: _product("addmv", 1, "mat", "vec"),
    torch.addmv_: _product("addmv", 1, "mat", "vec"),
    Tensor.addmv: _product("addmv", 1, "mat", "vec"),
    Tensor.addmv_: _product("addmv", 1, "mat", "vec"),
    torch.addbmm: _product("addbmm", 1, "batch1", "batch2"),
    Tensor.addbmm: _product("addbmm", 1, "batch1", "batch2"),
    Tensor.addbmm_: _product("addbmm", 1, "batch1", "batch2"),
    Tensor.addmm_: _product("addmm", 1, "mat1", "mat2"),
    Tensor.baddbmm_: _product("baddbmm", 1, "batch1", "batch2"),
    torch.einsum: Many("einsum", "", ()),
    torch.chain_matmul: Many("chain_matmul", "", (), first=0),
    torch.linalg.multi_dot: Many("multi_dot", "", (), first=0),
    torch.convolution: _layer("convolution", None),
    torch.conv_tbc: _layer("conv_tbc"),
    torch_internals.grouped_mm: _product("grouped_mm", 0, "input", "mat2"),
    F.grouped_mm: _product("grouped_mm", 0, "mat_a", "mat_b"),
    **_aten(
        {
            "linear": _layer("linear"),
            "conv1d": _layer("conv1d", -2),
            "conv2d": _layer("conv2d", -3),
            "conv3d": _layer("conv3d", -4),
            "conv_transpose1d": _layer("conv_transpose1d", -2),
            "conv_transpose2d": _layer("conv_transpose2d", -3),
            "conv_transpose3d": _layer("conv_transpose3d", -4),
            "convolution": _layer("convolution", None),
            "_convolution": _layer("convolution", None),
            "bilinear": _BILINEAR,
            "matmul": _product("matmul", 0, "self", "other"),
            "mm": _product("mm", 0, "self", "mat2"),
            "mv": _product("mv", 0, "self", "vec"),
            "bmm": _product("bmm", 0, "self", "mat2"),
            "dot": _product("dot", 0, "self", "tensor", right=-1),
            "vdot": _product("vdot", 0, "self", "other", right=-1),
            "inner": _product("inner", 0, "self", "other", right=-1),
            "linalg_vecdot": _product("vecdot", 0, "x", "y", right=-1),
            "addmm": _product("addmm", 1, "mat1", "mat2"),
            "addmv": _product("addmv", 1, "mat", "vec"),
            "addbmm": _product("addbmm", 1, "batch1", "batch2"),
            "baddbmm": _product("baddbmm", 1, "batch1", "batch2"),
            "tensordot": _product("tensordot", 0, "self", "other", right=-1),
            "einsum": Many("einsum", "", ()),
            "chain_matmul": Many("chain_matmul", "", (), first=0),
            "linalg_multi_dot": Many("multi_dot", "", (), first=0),
        }
    ),
    torch.lstm: _RECURRENT,
    torch.gru: _RECURRENT,
    torch.rnn_tanh: _RECURRENT,
    torch.rnn_relu: _RECURRENT,
    torch.lstm_cell: _RECURRENT,
    torch.gru_cell: _RECURRENT,
    torch.rnn_tanh_cell: _RECURRENT,
    torch.rnn_relu_cell: _RECURRENT,
}


_FAMILIES: dict[str, tuple[Callable, ...]] = {
    "relu": (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    "relu6": (F.relu6,),
    "hardtanh": (F.hardtanh, F.hardtanh_),  # nn.ReLU6 calls it too
    "threshold": (F.threshold, torch.threshold, torch.threshold_),
    "leaky_relu": (F.leaky_relu, F.leaky_relu_),
    "rrelu": (F.rrelu, F.rrelu_, torch.rrelu, torch.rrelu_),
    "prelu": (F.prelu, torch.prelu, Tensor.prelu),
    "elu": (F.elu, F.elu_),
    "celu": (F.celu, F.celu_, torch.celu),
    "selu": (F.selu, F.selu_, torch.selu),
    "gelu": (F.gelu,),
    "silu": (F.silu,),
    "mish": (F.mish,),
    "hardswish": (F.hardswish,),
    "softplus": (F.softplus,),
    "softsign": (F.softsign,),
    "logsigmoid": (F.logsigmoid,),
    "tanh": (F.tanh, torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_),
}

# Hidden activations. Gates (sigmoid, softmax) are none.
ACTIVATIONS: dict[Callable, Call] = {f: _activation(kind) for kind, row in _FAMILIES.items() for f in row}


def _open(function: Callable) -> Callable:
    """The same function, with its first check for function modes answered by "no".

    Such functions are Python compositions that hand themselves over whole to an active function mode. The copy runs its
    body instead, so that the linear calls inside it are seen one by one.
    """
    scope = {**function.__globals__, "has_torch_function": lambda *_: False}
    twin = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


# Compositions to look inside of, each with its opened twin.
OPENED: dict[Callable, Callable] = {F.multi_head_attention_forward: _open(F.multi_head_attention_forward)}

_LOOKS = {"__get__", "dim", "size", "stride", "numel", "is_contiguous", "is_floating_point", "ndimension", "__len__"}


def only_looks(function: Callable, result: Any) -> bool:
    """Whether a call asked a tensor for its shape, dtype and the like, and for none of its values."""
    return getattr(function, "__name__", "") in _LOOKS and not isinstance(result, Tensor)


CONSTANT_INPUT = "its input is a constant: it does not depend on the model's input"
FIXED_FILTER = "its weight is fixed: no parameter is a part of it"
UNSEEN = "where its other operand comes from was not seen: it may be data as well"
SCRIPTED = "inside a TorchScript module, which cannot be opened"
RECURRENT = "a fused recurrent kernel, which cannot be opened"
COMPLEX = "its input is complex, and a threshold is for real numbers"
NOT_DENSE = "its input is a sparse or nested tensor, and a threshold is for dense ones"
OTHER_DTYPE = "its input is of a dtype that a threshold does not take: it is for float16, bfloat16, float32 and float64"
VMAPPED = "it runs within torch.vmap, where its input cannot be measured"
IN_FUNCTION = "within a torch.autograd.Function, which has a backward of its own"
OTHER_CALL = "it was another kind of call in another batch, or had its data in another place"
OTHER_WEIGHT = "its data met another parameter in another batch: modules of their own would tell them apart"
UNMEASURED = (SCRIPTED, COMPLEX, NOT_DENSE, OTHER_DTYPE, VMAPPED)
FORGEABLE = (None, FIXED_FILTER, UNSEEN)  # by default, or where include= asks for it


class Operand(NamedTuple):
    """One input of one call that data may enter: where it sits, and why it is no site by default (None: it is one)."""

    key: Key
    value: Any
    weight: Any
    left_out: str | None


def data_operands(call: Call, args: tuple, kwargs: dict, origin: Callable[[Any], Origin]) -> list[Operand]:
    """The operands of one call that are sites, or would be but for a reason. Empty for a product of two activations.

    What is unknown is a weight where the call or the other operand says so, else data.
    """
    operands = call.operands(args, kwargs)
    roles = tuple([role for role, _, _ in operands])
    found = _data(call.opens, roles, tuple([origin(value) for _, _, value in operands]))
    return [Operand(*operands[i][1:], None if w is None else operands[w][2], why) for i, w, why in found]


@functools.lru_cache(maxsize=2**10)
def _data(opens: bool, roles: tuple[str, ...], origins: tuple[Origin, ...]) -> list[tuple[int, int | None, str | None]]:
    """Which operands are data, which is the weight that each meets, and why it is no site by default."""
    if roles[:1] == ("a",):
        return [(0, None, None if origins[0] >= Origin.UNKNOWN else CONSTANT_INPUT)]
    if not opens:
        return [(0, None, RECURRENT)]
    least = Origin.DATA if Origin.DATA in origins else Origin.UNKNOWN
    data = [i for i, role in enumerate(roles) if role == "x" or (role == "?" and origins[i] >= least)]
    weights = [i for i in range(len(roles)) if i not in data]
    if not data or not weights or any(origins[i] is Origin.DATA for i in weights):
        return []  # activations alone, constants alone, or a weight that is itself computed from the input
    fixed = UNSEEN if any(roles[i] == "?" and origins[i] is Origin.UNKNOWN for i in weights) else FIXED_FILTER
    fixed = None if any(origins[i] & Origin.PARAMETER for i in weights) else fixed
    return [(i, weights[0], fixed if origins[i] >= Origin.UNKNOWN else CONSTANT_INPUT) for i in data]


# All ways in which a call was made: its place in the code (`places.py`), and the names of the parameters that it met,
# each with the part of it that a view is.
Ways = tuple[tuple[str, ...], ...]


def both_ways(one: Ways, other: Ways) -> Ways:
    """Those of either."""
    return one if one == other else tuple(sorted({*one, *other}))


def parameter_in(value: Any) -> Tensor | None:
    """The parameter that a value is, or is a view of."""
    base = value if isinstance(value, torch.nn.Parameter) else getattr(value, "_base", None)
    return base if isinstance(base, torch.nn.Parameter) else None


def part_of(value: Tensor, parameter: Tensor) -> str:
    """Where a view's elements begin among its parameter's, and how many there are; "" where it is of all of them."""
    if value.numel() == parameter.numel():
        return ""
    return f"[{value.storage_offset() - parameter.storage_offset()}+{value.numel()}]"


ANY_PART = "[any]"  # one that data picks


@functools.lru_cache(maxsize=2**12)
def named_part(weight: str) -> tuple[str, str]:
    """A parameter's name, and which part of it is meant."""
    found = re.search(r"\[(-?\d+\+\d+|any)\]$", weight)
    return (weight[: found.start()], found[0]) if found else (weight, "")


def get(args: tuple, kwargs: dict, key: Key) -> Any:
    value = kwargs[key[0]] if isinstance(key[0], str) else args[key[0]]
    return value if len(key) == 1 else value[key[1]]


def replace(args: tuple, kwargs: dict, key: Key, new: Any) -> tuple[tuple, dict]:
    """The call's arguments with the operand at `key` replaced; the originals stay as they are."""
    if len(key) == 2:
        outer = get(args, kwargs, key[:1])
        new = type(outer)(new if i == key[1] else v for i, v in enumerate(outer))
    if isinstance(key[0], str):
        return args, {**kwargs, key[0]: new}
    return tuple(new if i == key[0] else v for i, v in enumerate(args)), kwargs


class Numbering:
    """Gives the calls of one forward pass their names, in the order in which they run."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, str], int] = {}

    def call(self, module: str, mark: str = "#") -> str:
        k = self.calls(module, mark)
        self._calls[module, mark] = k + 1
        return call_name(module, k, mark)

    def restart(self, module: str) -> None:
        """Count the module's calls from 0 again."""
        self._calls[module, "#"] = 0

    def calls(self, module: str, mark: str = "#") -> int:
        """How many calls the module has made."""
        return self._calls.get((module, mark), 0)

    def all_calls(self) -> dict[str, int]:
        """A module's name and its calls' mark -> how many it has made."""
        return {module + mark: made for (module, mark), made in self._calls.items()}


def call_name(module: str, k: int, mark: str = "#") -> str:
    """The name of the k-th call in a module."""
    return module if k == 0 and module and mark == "#" else f"{module}{mark}{k}"


def _without(module: str) -> str:
    """How to forge without a module, for a message."""
    return f"forge without this module (exclude={(module or '#') + '*'!r})"


def unseen_call(module: str, k: int, most: int) -> RuntimeError:
    """What is raised where a module makes more calls than calibration saw."""
    return RuntimeError(
        f"{module or 'the model'!r} makes its call number {k} (counted from 0) of linear, convolution or "
        f"product, and calibration saw {most} at most: calibrate on data that reaches it, or {_without(module)}"
    )


def other_place(module: str, k: int, how: str = "in another place of its code") -> RuntimeError:
    """What is raised where the k-th call is made in another place, or in another way, than in calibration."""
    return RuntimeError(
        f"{module or 'the model'!r} makes its call number {k} (counted from 0) of linear, convolution, product or "
        f"activation {how} than in calibration: on this path calls have other numbers, and would be given "
        f"thresholds of others. Calibrate on data that takes both paths, or {_without(module)}"
    )


def other_call(module: str, seen: str, made: str) -> RuntimeError:
    """What is raised where a module's call is another one than it was in calibration."""
    how = f"{made} in the place of {seen}" if made != seen else f"{made} with its data where a parameter was, or none"
    return RuntimeError(
        f"{module or 'the model'!r} calls {how}, on a path that calibration did not see: calibrate on data that takes "
        f"both, or {_without(module)}"
    )


def check_weight(site: str, owner: torch.nn.Module, seen: Iterable[str], met: list[Tensor]) -> None:
    """RuntimeError where a call meets another parameter of the owner's than it did in calibration.

    seen: the names that one has there. What is no parameter of the owner's (functional_call's, say) is let be.
    """
    held = [parameter for name in seen if (parameter := parameter_of(owner, name)) is not None]
    if not held or any(parameter is value for parameter in held for value in met):
        return
    other = next((name for name, parameter in owner.named_parameters() for value in met if parameter is value), None)
    if other is not None:
        raise RuntimeError(
            f"the data of site {site!r} met the parameter {min(seen)!r} in calibration, and meets {other!r}: the "
            f"threshold is of the first. Calibrate on data that takes both paths, {_without(module_of(site))}, or make "
            "modules of their own of the two"
        )


def parameter_of(owner: torch.nn.Module, name: str) -> Tensor | None:
    """A parameter by its name; None where something else is there by now."""
    path, _, leaf = name.rpartition(".")
    try:
        return owner.get_submodule(path)._parameters.get(leaf)
    except AttributeError:
        return None


def operand_name(call: str, index: int) -> str:
    """A call with several data inputs (bilinear) has a site for each: the later ones carry `:1`, `:2`."""
    return call if index == 0 else f"{call}:{index}"


def has_input(kind: str, key: Key) -> bool:
    """Whether some function of that kind takes an operand at that place that may be data."""
    rows = {call for call in (*CALLS.values(), *ACTIVATIONS.values()) if call.kind == kind}
    if first := [call.first for call in rows if isinstance(call, Many)]:
        return len(key) in (1, 2) and all(type(part) is int for part in key) and int(key[0]) >= min(first)
    return any(role != "w" and key in ((p,), (k,)) for c in rows for role, (p, k) in zip(c.roles, c.keys, strict=True))


def names_of(model: torch.nn.Module) -> dict[int, str]:
    """id of each submodule -> its first name: a module that is registered twice has one name here."""
    return {id(module): name for name, module in model.named_modules()}


# A site's name: its module, which of the module's calls, which of the call's data inputs. See above.
_NAME = re.compile(r"(?P<module>.*?)((?P<mark>[#@])(?P<call>[0-9]+))?(:(?P<operand>[0-9]+))?", re.DOTALL)


@functools.lru_cache(maxsize=2**16)
def _part(site: str, part: str) -> str | None:
    return _NAME.fullmatch(site)[part]


def module_of(site: str) -> str:
    """The name of the module that runs the site's call."""
    return _part(site, "module")


def is_activation(site: str) -> bool:
    """Whether the site is an activation's call."""
    return mark_of(site) == "@"


def mark_of(site: str) -> str:
    """What stands ahead of the number in the site's name, whether or not it carries one."""
    return _part(site, "mark") or "#"


def call_of(site: str) -> int:
    """Which of its module's calls of that mark the site is, counted from 0."""
    return int(_part(site, "call") or 0)


def operand_of(site: str) -> int:
    """Which of its call's data inputs the site is, counted from 0."""
    return int(_part(site, "operand") or 0)
