"""Whether a module's forward is one straight line of code, whatever it is given and whatever its flags say.

Calibration sees what a module does with its input in the runs that it watches. A layer's threshold goes ahead of its
forward, where that makes one call on its input; in another mode, or on another shape, a forward of someone's own may
do something else first. What has no branch, or is a library's layer, always does what was seen.

So a forward is straight where all that it names is known: numbers, tensors, modules (whose calls are watched),
functions of libraries, and functions that were read and are straight themselves. An object of someone's own, a table
of functions, or what is looked up by a text may do anything.
"""

import ast
import builtins
import contextlib
import dis
import enum
import functools
import inspect
import itertools
import logging
import numbers
import textwrap
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from forged_fx.places import codes_in

# Layers of theirs choose among ways to the same result.
_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "accelerate")
# What functions of these do to a tensor is watched, or is nothing.
_TRUSTED = (
    *("torch", "numpy", "builtins", "math", "cmath", "operator", "functools", "itertools", "collections", "contextlib"),
    *("typing", "warnings", "logging", "copy", "enum", "random", "time"),
)
_BRANCHES = (ast.If, ast.IfExp, ast.BoolOp, ast.For, ast.While, ast.Match, ast.Try, ast.comprehension)

_JUMPS = ("POP_JUMP", "JUMP_IF", "FOR_ITER", "SEND")

# What looks a name up by a text.
_LOOKS_UP = ("getattr", "attrgetter", "methodcaller", "import_module", "__import__", "eval", "exec", "globals",
             "locals", "vars", "__dict__", "__getattr__", "__getattribute__")  # fmt: skip
_PLAIN = (numbers.Number, str, bytes, slice, range, types.NoneType, types.EllipsisType, logging.Logger, torch.Tensor)
_DESCRIPTORS = (types.MethodDescriptorType, types.WrapperDescriptorType, types.GetSetDescriptorType,
                types.MemberDescriptorType, types.ClassMethodDescriptorType)  # fmt: skip
# The kinds of a result, or of an argument: what code asks them for, they have.
_RESULTS = (torch.Tensor, torch.dtype, torch.device, torch.Size, torch.finfo, torch.autograd.Function, str, list, dict,
            set, type, logging.Logger)  # fmt: skip


def is_straight(module: torch.nn.Module) -> bool:
    """Whether neither the module's forward nor anything that it names may branch."""
    return _Reading(module).is_known(module.forward, 4, module)


def _enclosed(function: types.FunctionType) -> list[Any]:
    """What a function has in its closure: what its decorator was given, say."""
    return [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]


class _Unknown:
    """Stands for what is not found."""


_UNKNOWN = _Unknown()

_Found = tuple[Any, Any]  # a value, and what has it as its attribute; None: nothing does


class _Reading:
    """Of a module's code, and of what that names. depth: how many calls deep to look; what lies deeper is unknown."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.begun: set[tuple[types.FunctionType, int]] = set()

    def is_known(self, value: Any, depth: int, owner: Any = None) -> bool:
        """Whether a value does the same to a tensor in every run."""
        if isinstance(value, types.MethodType):
            return self.is_known(value.__func__, depth, value.__self__)
        if isinstance(value, types.FunctionType):
            return self._is_straight(value, owner, depth)
        if inner := _wrapped(value):
            return all(self.is_known(one, depth, owner) for one in inner)
        if isinstance(value, types.BuiltinMethodType | types.MethodWrapperType):
            return _is_of(value, _TRUSTED) or self.is_known(value.__self__, depth)
        if isinstance(value, list | tuple | set | frozenset | dict):  # of functions, code may choose one
            held = [*(value.values() if isinstance(value, dict) else value)]
            return depth > 0 and not any(map(_is_own_code, held)) and all(self.is_known(v, depth - 1) for v in held)
        if isinstance(value, type | types.ModuleType):
            return _is_of(value, _TRUSTED) or (isinstance(value, type) and issubclass(value, BaseException))
        if isinstance(value, torch.nn.Module):
            return any(value is one for one in self.module.modules()) or _is_of(type(value), _LIBRARIES)
        if isinstance(value, enum.Enum):
            return self.is_known(value.value, depth)
        return isinstance(value, (*_PLAIN, *_DESCRIPTORS)) or _is_of(type(value), (*_LIBRARIES, "numpy"))

    def _is_straight(self, function: types.FunctionType, owner: Any, depth: int) -> bool:
        if (function, id(owner)) in self.begun:  # (what calls itself without a branch never ends)
            return True
        self.begun.add((function, id(owner)))
        given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        if _is_of(function, _LIBRARIES if isinstance(owner, torch.nn.Module) else _TRUSTED):
            own = (*given, *_enclosed(function), *_instead(function, owner))
            return all(self.is_known(one, depth, owner) for one in own if _is_own_code(one))
        if not depth or _branches(function.__code__):
            return False
        found = ((value, None) for value in given)
        return all(self.is_known(v, depth - 1, of) for v, of in itertools.chain(found, self._named(function, owner)))

    def _named(self, function: types.FunctionType, owner: Any) -> Iterator[_Found]:
        """Every global and attribute that a function's code names. Of an attribute of an attribute the last is meant:
        `self.config.scale` is a number."""
        scope = {**vars(builtins), **function.__globals__}
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        first = (*function.__code__.co_varnames[: function.__code__.co_argcount], None)[0]  # (`self`, of a method)
        for code in codes_in(function.__code__):
            ends: list[_Found] = []  # of the names up to here, dot by dot
            ahead = ""
            for opname, name in _steps(code):
                local, ahead = ahead, ""
                if name in _LOOKS_UP:
                    yield _UNKNOWN, None
                if opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")):
                    of = [owner] if local == first and [*_held(owner, name)] else [value for value, _ in ends]
                    ends = [*self._attributes(of, name, owner)]
                    continue
                if opname.startswith("LOAD_FAST"):
                    ahead = name[-1] if isinstance(name, tuple) else name
                yield from ends
                ends = []
                if opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                    ends = [(scope.get(name, _UNKNOWN), None)]
                elif opname == "IMPORT_NAME" and name.partition(".")[0] not in _TRUSTED:
                    ends = [(_UNKNOWN, None)]
                elif "DEREF" in opname and name in cells and name != "__class__":  # (which is for super())
                    with contextlib.suppress(ValueError):  # an empty one
                        ends = [(cells[name].cell_contents, None)]
            yield from ends

    def _attributes(self, values: list[Any], name: str, owner: Any) -> Iterator[_Found]:
        """An attribute of what was found; of anything else the owner's, or that of any module, if one has it."""
        for value in values:
            if found := [*_held(value, name)]:
                yield from ((one, value) for one in found)
                continue
            kind = value if isinstance(value, type | types.ModuleType) else type(value)
            if not _is_of(kind, _TRUSTED + _LIBRARIES):
                yield _UNKNOWN, value
        if not values:
            found = [(one, of) for of in (owner, *self.module.modules()) for one in _held(of, name)]
            yield from found
            if not found and not any(hasattr(kind, name) for kind in _RESULTS):
                yield _UNKNOWN, None


def _held(value: Any, name: str) -> Iterator[Any]:
    """What an object has under a name; of its classes each that has one: one may call the next."""
    if isinstance(value, enum.EnumType) and name in value.__members__:
        yield value.__members__[name]
        return
    name = "_value_" if name == "value" and isinstance(value, enum.Enum) else name
    own = getattr(value, "__dict__", {})
    places = [own, *(own.get(kind) or {} for kind in ("_parameters", "_buffers", "_modules"))]
    is_class = isinstance(value, type)
    for place in (*([] if is_class else places), *map(vars, (value if is_class else type(value)).__mro__)):
        if name in place:
            found = place[name]
            if isinstance(found, types.MemberDescriptorType) and not is_class:
                with contextlib.suppress(AttributeError):  # an empty slot
                    found = found.__get__(value)
            yield found
    if is_class and name == "apply" and issubclass(value, torch.autograd.Function):
        yield from _held(value, "forward")


def _instead(function: types.FunctionType, owner: Any) -> Iterator[Any]:
    """What someone has put in the place of a module's methods that a library's function names."""
    if isinstance(owner, torch.nn.Module):
        classes = [cls for cls in type(owner).__mro__ if not _is_of(cls, _LIBRARIES + _TRUSTED)]
        places = (vars(owner), *map(vars, classes))
        yield from (place[name] for name in function.__code__.co_names for place in places if name in place)


def _wrapped(value: Any) -> list[Any]:
    """What stands for other callables: those, and what they are given."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, functools.cached_property):
        return [value.func]
    return [value.__wrapped__] if isinstance(value, staticmethod | classmethod | functools._lru_cache_wrapper) else []


def _is_own_code(value: Any) -> bool:
    """Whether it is a Python function, in whatever stands for it, that says nothing of what it does."""
    if isinstance(value, types.MethodType):
        return _is_own_code(value.__func__)
    if isinstance(value, types.FunctionType):
        return not _is_of(value, _TRUSTED)
    return any(map(_is_own_code, _wrapped(value)))


def _is_of(value: Any, libraries: Iterable[str]) -> bool:
    """Whether a module, class or function is a library's. (A decorator gives a function the other's `__module__`.)"""
    if isinstance(value, types.FunctionType):
        name = value.__globals__.get("__name__")
    else:
        name = getattr(value, "__name__" if isinstance(value, types.ModuleType) else "__module__", None)
    return str(name).partition(".")[0] in libraries


@functools.lru_cache(maxsize=1024)
def _steps(code: types.CodeType) -> tuple[tuple[str, Any], ...]:
    return tuple((step.opname, step.argval) for step in dis.get_instructions(code))


@functools.lru_cache(maxsize=1024)
def _branches(code: types.CodeType) -> bool:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
        if not isinstance(tree, ast.FunctionDef):
            raise TypeError
    except (OSError, SyntaxError, TypeError, ValueError):  # no source, or a lambda's, which is a part of a line
        inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        return any(opname.startswith(_JUMPS) for one in (code, *inner) for opname, _ in _steps(one))
    given = set(inspect.getargs(code).args)
    ahead: list[ast.AST] = [tree]
    while ahead:
        node = ahead.pop()
        if _only_raises(node):
            continue
        if isinstance(node, _BRANCHES) or (isinstance(node, ast.Call) and _chooses(node.func, given)):
            return True
        ahead += ast.iter_child_nodes(node)
    return False


def _chooses(called: ast.expr, given: set[str]) -> bool:
    """Whether what is called is none that the code names: it is looked up, or made, or the caller's."""
    return called.id in given if isinstance(called, ast.Name) else not isinstance(called, ast.Attribute)


def _only_raises(node: ast.AST) -> bool:
    """Whether it checks something, and does nothing else."""
    is_check = isinstance(node, ast.If) and not node.orelse and all(isinstance(step, ast.Raise) for step in node.body)
    return is_check or isinstance(node, ast.Assert)
