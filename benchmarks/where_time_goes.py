"""Where the time goes that one run takes more than another: the operators whose time differs most, by PyTorch's
profiler.

`generated code` is what Inductor made, called as one; `Python and the rest` is what no operator accounts for. A
profiled run is slower than one that is not, and wall-clock time counts here: a rough map, not a measurement.
"""

import time
from collections.abc import Callable

import numpy as np
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]

REST = "Python and the rest"
# how the profiler's names begin -> what they are called here; they go on with a hash or a number
NAMES = {"## Call CompiledFxGraph": "generated code", "Torch-Compiled Region": "around the generated code"}


def differences(plain: Run, other: Run, rounds: int = 7, most: int = 4) -> list[tuple[str, float, float]]:
    """(operator, ms of a plain run, ms of the other), at most `most`, the greatest loss first: medians over rounds in
    turn. Only operators that take longer in the other, and a line for the whole ahead of them."""
    plain(), other()
    taken = [(by_operator(plain), by_operator(other)) for _ in range(rounds)]
    names = {name for pair in taken for each in pair for name in each}
    rows = [(name, *(float(np.median([pair[i].get(name, 0) for pair in taken])) for i in (0, 1))) for name in names]
    rows = sorted((row for row in rows if row[2] > row[1]), key=lambda row: row[1] - row[2])
    whole = (float(np.median([sum(pair[i].values()) for pair in taken])) for i in (0, 1))
    return [("all", *whole), *rows[:most]]


def by_operator(run: Run) -> dict[str, float]:
    """Milliseconds of one run: operator -> its own time, without the operators that it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()
        run()
        whole = 1e3 * (time.perf_counter() - began)
    own: dict[str, float] = {}
    for event in profiled.key_averages():
        name = next((name for begins, name in NAMES.items() if event.key.startswith(begins)), event.key)
        own[name] = own.get(name, 0) + event.self_cpu_time_total / 1e3
    return own | {REST: whole - sum(own.values())}


def text(rows: list[tuple[str, float, float]]) -> str:
    """Lines: what takes how much longer."""
    return "\n".join(f"    {name:44} {plain:9.3f} -> {other:9.3f} ms" for name, plain, other in rows)
