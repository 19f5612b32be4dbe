"""Whether a module's forward is one straight line of code, whatever it is given and whatever its flags say.

Calibration sees what a module does with its input in the runs that it watches. A layer's threshold goes ahead of its
forward, where that makes one call on its input; in another mode, or on another shape, a forward of someone's own may
do something else first. What has no branch, or is a library's layer, always does what was seen.
"""

import ast
import dis
import functools
import inspect
import textwrap
import types
from typing import Any

import torch

# Layers of theirs choose among ways to the same result.
_LIBRARIES = ("torch", "torchvision", "timm", "transformers", "accelerate")
_BRANCHES = (ast.If, ast.IfExp, ast.BoolOp, ast.For, ast.While, ast.Match, ast.Try, ast.comprehension)

_JUMPS = ("POP_JUMP", "JUMP_IF", "FOR_ITER", "SEND")


def is_straight(module: torch.nn.Module) -> bool:
    """Whether neither the module's forward nor what it calls of its class and its file branches."""
    forward = module.forward
    while isinstance(forward, functools.partial):  # one that was set on the module
        forward = forward.func
    forward = getattr(forward, "__func__", forward)
    if not isinstance(forward, types.FunctionType) or not _straight(forward, type(module)):
        return False
    own = (held for name in forward.__code__.co_names if isinstance(held := vars(module).get(name), types.FunctionType))
    return all(_straight(function, type(module)) for function in own)


def _straight(function: types.FunctionType, owner: type, depth: int = 4) -> bool:
    """The same of a function. depth: how many calls deep to look; what lies deeper is not known to be straight."""
    if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
        return True
    if not depth or _branches(function.__code__):
        return False
    return all(_straight(called, owner, depth - 1) for called in _named_in(function, owner))


def _named_in(function: types.FunctionType, owner: type) -> list[types.FunctionType]:
    """The Python functions that a function may call: of its class, of its file, of a module there, of a decorator."""
    names, scope = function.__code__.co_names, function.__globals__
    modules = [held for name in names if isinstance(held := scope.get(name), types.ModuleType)]
    places = [*map(vars, owner.__mro__), scope, *map(vars, modules)]
    found = [place.get(name) for name in names for place in places]
    found = [one.fget if isinstance(one, property) else getattr(one, "__func__", one) for one in found]
    found += enclosed(function)
    return [one for one in found if isinstance(one, types.FunctionType) and one is not function]


def enclosed(function: types.FunctionType) -> list[Any]:
    """What a function has in its closure: what its decorator was given, say."""
    return [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]


@functools.lru_cache(maxsize=1024)
def _branches(code: types.CodeType) -> bool:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    except (OSError, SyntaxError, TypeError, ValueError):  # no source, or a lambda's, which is a part of a line
        inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        return any(s.opname.startswith(_JUMPS) for one in (code, *inner) for s in dis.get_instructions(one))
    ahead: list[ast.AST] = [tree]
    while ahead:
        node = ahead.pop()
        if _only_raises(node):
            continue
        if isinstance(node, _BRANCHES) or (isinstance(node, ast.Call) and _chooses(node.func)):
            return True
        ahead += ast.iter_child_nodes(node)
    return False


def _chooses(called: ast.expr) -> bool:
    """Whether what is called is none that the code names: it is looked up, or made."""
    is_super = isinstance(called, ast.Attribute) and isinstance(called.value, ast.Call)
    while isinstance(called, ast.Attribute) and not is_super:
        called = called.value
    return not (is_super or isinstance(called, ast.Name | ast.Constant)) or getattr(called, "id", "") == "getattr"


def _only_raises(node: ast.AST) -> bool:
    """Whether it checks something, and does nothing else."""
    is_check = isinstance(node, ast.If) and not node.orelse and all(isinstance(step, ast.Raise) for step in node.body)
    return is_check or isinstance(node, ast.Assert)
