"""A progress bar on a terminal, silence elsewhere."""

import sys
from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from typing import Any


def track(items: Iterable[Any], what: str, limit: int | None = None) -> Iterator[Any]:
    """The items, at most `limit` of them, with a bar on stderr if that is a terminal and rich is installed."""
    total = len(items) if isinstance(items, Sized) else None
    if limit is not None:
        items, total = islice(items, limit), limit if total is None else min(limit, total)
    if not sys.stderr.isatty():
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track as bar
    except ImportError:
        yield from items
        return
    yield from bar(items, what, total, console=Console(stderr=True), transient=True)
