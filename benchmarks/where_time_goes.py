"""Where the time goes that one run takes more than another: the operators whose time differs most, by PyTorch's
profiler.

`generated code` is what Inductor made, called as one; `Python and the rest` is what no operator accounts for. A
profiled run is slower than one that is not, and wall-clock time counts here: a rough map, not a measurement.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch.profiler import ProfilerActivity, profile, record_function

Run = Callable[[], object]

REST = "Python and the rest"
# how the profiler's names begin -> what they are called here; they go on with a hash or a number
NAMES = {"## Call CompiledFxGraph": "generated code", "Torch-Compiled Region": "around the generated code"}


def differences(plain: Run, other: Run, rounds: int = 7) -> list[tuple[str, float, float]]:
    """(operator, ms of a plain run, ms of the other), at most four, the greatest loss first: medians over rounds in
    turn. Only operators that take longer in the other, and a line for the whole ahead of them."""
    plain(), other()  # what happens but once
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(rounds):
            for run in (plain, other):
                with record_function(REST):
                    run()
    runs = by_operator(profiled.events())
    names = {name for run in runs for name in run}
    medians = {name: [float(np.median([run[name] for run in runs[i::2]])) for i in (0, 1)] for name in names}
    rows = sorted(((name, *ms) for name, ms in medians.items() if ms[1] > ms[0]), key=lambda row: row[1] - row[2])
    whole = (float(np.median([run.total() for run in runs[i::2]])) for i in (0, 1))
    return [("all", *whole), *rows[:4]]


def by_operator(events: Iterable[Any]) -> list[Counter[str]]:
    """Milliseconds of each run, in order: operator -> its own time, without the operators that it calls."""
    runs: dict[Any, Counter[str]] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        run = event
        while run.cpu_parent is not None:
            run = run.cpu_parent
        if run.name != REST:  # another thread's
            continue
        name = next((name for begins, name in NAMES.items() if event.name.startswith(begins)), event.name)
        runs.setdefault(run.id, Counter())[name] += event.self_cpu_time_total / 1e3
    return list(runs.values())


def text(rows: list[tuple[str, float, float]]) -> str:
    """Lines: what takes how much longer."""
    return "\n".join(f"    {name:44} {plain:9.3f} -> {other:9.3f} ms" for name, plain, other in rows)
