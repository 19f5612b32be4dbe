"""Values from files, checked before anything is made of them: files are data, and may come from anyone."""

import json
import numbers
import os
import stat
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

TEXT = 2**25  # bytes that a JSON text may have; the record of a million inputs has 16 MB
DEPTH = 64  # of lists and objects within each other


def regular(path: Path) -> int:
    """The size of a regular file in bytes; ValueError for anything else: no pipe is waited for, no device read."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is not a regular file")
    return found.st_size


def read(path: Path, most: int = TEXT) -> bytes:
    """The content of a regular file; ValueError if it has more than `most` bytes."""
    size = regular(path)
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes, and at most {most:,} belong there")
    return path.read_bytes()


def parse(text: str | bytes) -> Any:
    """JSON; ValueError for anything else, among it what is larger than `TEXT` or nested out of all reason."""
    if len(text) > TEXT:
        raise ValueError(f"a text of {len(text):,} bytes, where at most {TEXT:,} belong")
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level, depth = [value], 0
    while level := [inner for node in level for inner in _items(node) if isinstance(inner, dict | list)]:
        depth += 1
        if depth > DEPTH:  # whoever goes through it, or writes it again, may do so by recursion
            raise ValueError("it is nested too deeply")
    return value


def _items(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def fit(value: Any, kind: Any, where: str) -> Any:
    """A JSON value as `kind` has it, an annotation: `int`, `str | None`, `tuple[int, ...]`, `dict[str, list[str]]`, ...
    Or a dataclass, which is made by its own `of`, if it has one, or by `build`.

    Lists become tuples where those are asked for, whole numbers floats. Nothing else is converted: ValueError says
    where the value stands, and what belongs there.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return kind.of(value) if hasattr(kind, "of") else build(kind, value, where)
    if kind is Any or (type(value) is kind and kind in _EXACT and _EXACT[kind](value)):
        return value
    if kind is float and type(value) is int and abs(value) < 2**63:
        return float(value)
    if origin in (Union, types.UnionType):
        for one in inner:
            try:
                return fit(value, one, where)
            except ValueError:
                continue
    elif origin in (list, tuple) and isinstance(value, list) and (... in inner or len(inner) in (1, len(value))):
        return origin(fit(item, inner[0], f"{where}[{i}]") for i, item in enumerate(value))
    elif origin in (dict, Mapping) and isinstance(value, dict):
        return {fit(k, inner[0], where): fit(v, inner[1], f"{where}.{k}") for k, v in value.items()}
    name = getattr(kind, "__name__", str(kind)) if not inner else str(kind)
    raise ValueError(f"{visible(where)[:200]} is {short(value)}, and {name} belongs there")


# numbers that fit into 64 bits; text without lone surrogates, which cannot be written again
_EXACT = {
    int: lambda value: abs(value) < 2**63,
    float: lambda value: True,
    bool: lambda value: True,
    str: lambda value: not any("\ud800" <= c <= "\udfff" for c in value),
    types.NoneType: lambda value: True,
}


def build(cls: type, record: Any, where: str, **given: Any) -> Any:
    """A dataclass from a JSON object that holds each of its fields but those given, and nothing else."""
    kinds, names = get_type_hints(cls), {field.name for field in fields(cls)} - given.keys()
    if not isinstance(record, dict) or record.keys() != names:
        found = sorted(record) if isinstance(record, dict) else record
        raise ValueError(f"{where} is {short(found)}, and the fields {', '.join(sorted(names))} belong there")
    return cls(**{name: fit(record[name], kinds[name], f"{where}.{name}") for name in names}, **given)


def several(given: Any, name: str, what: str) -> list[Any]:
    """An argument that holds several, as a list; TypeError for one by itself, which Python would take apart or not."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name}={given!r}: a list of {what}, such as [{given!r}]")
    if not isinstance(given, set | frozenset):
        return list(given)
    try:  # a set has another order in each process
        return sorted(given)
    except TypeError:
        return sorted(given, key=repr)


def whole_number(given: Any, name: str, least: int | None = None) -> int:
    """The argument as an int, whatever kind of whole number it is; TypeError for what is none, ValueError for one that
    is too small, or that 64 bits do not hold."""
    bound = "" if least is None else f" of at least {least}"
    if not isinstance(given, numbers.Integral) or isinstance(given, bool):
        raise TypeError(f"{name}={short(given)}: a whole number{bound}")
    number = int(given)
    if least is not None and number < least:
        raise ValueError(f"{name}={number}: at least {least}")
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name}={short(number)}: a whole number{bound} that 64 bits hold")
    return number


def path(given: Any, what: str) -> None:
    """TypeError for an argument that is no path. what: what the path is of, and of whom."""
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"{what} takes a path, not {type(given).__name__}")


def folder(given: Any, of: str) -> None:
    """An error for an argument that names no folder: ValueError for an empty name, which the file system takes for the
    folder that the program happens to run in."""
    path(given, f"folder= of {of}")
    if not os.fspath(given):
        raise ValueError(f"folder={given!r} of {of} names no folder: write '.' if you mean the one you are in")


def short(value: Any) -> str:
    """The value for an error: its beginning, with what a terminal would act on escaped."""
    try:
        text = ascii(value).replace("\n", " ")
    except (RecursionError, ValueError):  # nested deeply, or a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def visible(text: str) -> str:
    """The text with what a terminal would act on (escape sequences, reversed writing) escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def in_a_line(error: Exception) -> str:
    """Its type, and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
