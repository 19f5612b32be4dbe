"""Where in a module's code a call stands.

Calls are known by their number, and where code branches the same number may be another call's. A place is the way from
the module's own call to the one in question: of each function on it the name, a digest of its code, and how far it has
come. Where code has changed since, its places say nothing.
"""

import functools
import hashlib
import types
from collections.abc import Iterable
from pathlib import Path

import torch

from forged_fx import torch_internals

# The frames of whoever watches, or keeps Dynamo out, or runs hooks.
_PASSED_BY = (
    *(str(Path(file).parent) for file in (__file__, torch._dynamo.__file__)),
    torch.nn.modules.module.__file__,
)


def place() -> str:
    """Of the call that is running, in the innermost module."""
    steps = []
    for frame in torch_internals.frames():
        if frame.f_code is torch_internals.MODULE_CALL:
            break
        if not frame.f_code.co_filename.startswith(_PASSED_BY):
            steps.append(f"{_signed(frame.f_code)}+{frame.f_lasti}")
    return ">".join(reversed(steps))


@functools.lru_cache(maxsize=4096)
def _signed(code: types.CodeType) -> str:
    return f"{code.co_name}@{hashlib.sha256(code.co_code).hexdigest()[:8]}"


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
