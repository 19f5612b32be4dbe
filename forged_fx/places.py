"""Where in a module's code a call stands.

Calls are known by their number, and where code branches the same number may be another call's. A place is the way from
the module's own call to the one in question: of each function on it the name, a digest of its code, and how far it has
come. Where code has changed since, its places say nothing.
"""

import hashlib
import itertools
import re
import sys
import types
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from forged_fx import torch_internals

# The frames of whoever watches, or keeps Dynamo out, or runs hooks.
_DYNAMO = Path(torch.__file__).parent / "_dynamo"  # (which is loaded when it is first used)
_PASSED_BY = (str(Path(__file__).parent), str(_DYNAMO), torch.nn.modules.module.__file__)


def place() -> str:
    """Of the call that is running, in the innermost module."""
    steps = []
    for frame in torch_internals.frames():
        if frame.f_code is torch_internals.MODULE_CALL:
            break
        if signed := _signed(frame.f_code):
            steps.append(f"{signed}+{frame.f_lasti}")
    return ">".join(reversed(steps))


# By id, of a code that is kept: to hash one takes longer than all else.
_known: dict[int, tuple[types.CodeType, str]] = {}


def _signed(code: types.CodeType) -> str:
    """The name and digest of a function; "" of one that is passed by."""
    if (found := _known.get(id(code))) is not None:
        return found[1]
    if len(_known) > 4096:
        _known.clear()
    ours = code.co_filename.startswith(_PASSED_BY)
    signed = "" if ours else f"{code.co_name}@{hashlib.sha256(code.co_code).hexdigest()[:8]}"
    _known[id(code)] = code, signed
    return signed


def steps_at(trace: str) -> set[str]:
    """What the last step of a place may be, of a call in a compiled graph, which keeps a trace: file, line, function.

    Several, where a line makes several calls; none, where the function is out of sight.
    """
    if not (found := re.findall(r'^  File "(.*)", line (\d+), in (.*)$', trace, flags=re.MULTILINE)):
        return set()
    file, line, name = found[-1]
    return {
        f"{_signed(code)}+{offset}"
        for code in _codes(file)
        if code.co_name == name
        for offset, (at, *_) in zip(itertools.count(0, 2), code.co_positions(), strict=False)
        if at == int(line)
    }


def _codes(file: str) -> Iterator[types.CodeType]:
    """The code of the functions of a file that was imported, or typed."""
    modules = [m for m in [*sys.modules.values()] if getattr(m, "__file__", None) == file or m.__name__ == "__main__"]
    held = [value for module in modules for value in [*vars(module).values()]]
    held += [value for cls in held if isinstance(cls, type) for value in [*vars(cls).values()]]
    for one in held:
        function = getattr(one, "__func__", one)
        while isinstance(function, types.FunctionType):
            if function.__code__.co_filename == file:
                yield from codes_in(function.__code__)
            function = getattr(function, "__wrapped__", None)


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """It, and that of the functions and classes that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


def innermost(place: str) -> str:
    """Its last step: the function that makes the call, and where in it."""
    return place.rpartition(">")[2]


def is_of_changed_code(new: str, known: Iterable[str]) -> bool:
    """Whether a place is in a function that was another one, under the same name, when the others were seen."""
    digests: dict[str, set[str]] = {}
    for one in known:
        for name, digest in _functions(one):
            digests.setdefault(name, set()).add(digest)
    return any(name in digests and digest not in digests[name] for name, digest in _functions(new))


def _functions(place: str) -> list[tuple[str, str]]:
    signed = [step.rpartition("+")[0].rpartition("@") for step in place.split(">")]
    return [(name, digest) for name, _, digest in signed]
