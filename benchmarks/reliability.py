"""What the library promises under odd input, hostile files, kills and load: each promise tried at length, one table.

    python benchmarks/reliability.py                    all of it: about an hour on one core
    python benchmarks/reliability.py hostile load       parts: properties, hostile, kills, load
    python benchmarks/reliability.py --scale 0.05       a twentieth of it

Each row says how often a promise was tried, how often it did not hold (each such case is printed, with what makes it
again), and a figure. The exit code is 1 if any did not. tests/ tries less of the same: docs/reliability.md.
"""

import argparse
import csv
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
COLUMNS = ("part", "promise", "tried", "failed", "figure", "seconds")
HOSTILE = {"statistics": 6_000, "unfinished run": 2_000, "weights": 2_000, "result": 2_000, "unfinished scan": 2_000}
HOSTILE |= {"sweep": 2_000, "search": 2_000, "unfinished evaluation": 2_000}
HOSTILE |= {"unfinished sweep": 2_000, "unfinished search": 2_000}
KILLS, BATCHES, INPUTS = 50, 1000, 10_000

Rows = Iterator[tuple[str, int, int, str]]  # promise, tried, failed, figure


def _run(*command: object) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], env=env, cwd=ROOT, capture_output=True, text=True)


def properties(scale: float) -> Rows:
    """The full run of hypothesis; a smaller scale takes the normal one."""
    profile = "full" if scale >= 1 else "normal"
    options = (f"--hypothesis-profile={profile}", "--hypothesis-show-statistics", "-p", "no:cacheprovider", "-q")
    done = _run("-m", "pytest", "tests/test_properties.py", *options)
    passing = sum(int(n) for n in re.findall(r"(\d+) passing", done.stdout))
    failing = sum(int(n) for n in re.findall(r"(\d+) failing", done.stdout))
    if done.returncode or not passing:
        print(done.stdout[-6000:], file=sys.stderr)
    figure = f"{len(re.findall('during generate phase', done.stdout))} properties"
    yield (
        f"what holds for every tensor, model and scan ({profile})",
        passing + failing,
        failing or done.returncode or int(not passing),
        figure,
    )


def hostile(scale: float) -> Rows:
    import hostile as files

    warnings.filterwarnings("ignore", message="Detected pickle protocol")
    for name, count in HOSTILE.items():
        target, tried = files.TARGETS[name], max(1, round(count * scale))
        outcomes: Counter[str] = Counter()
        failed, slowest = 0, 0.0
        with tempfile.TemporaryDirectory() as made:
            target.make(Path(made))
            sound = files.snapshot(Path(made))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(tried):
            with tempfile.TemporaryDirectory() as folder:
                began = time.process_time()
                try:
                    outcomes[files.attempt(target, sound, number, Path(folder))] += 1
                except Exception as error:
                    failed += 1
                    print(f"hostile {name}, case {number}: {type(error).__name__}: {error}"[:500], file=sys.stderr)
                slowest = max(slowest, time.process_time() - began)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        refused = sum(n for outcome, n in outcomes.items() if outcome != "taken")
        figure = f"{refused} refused, {outcomes['taken']} did no harm; slowest {slowest:.2f} s; memory +{grown:.0f} MB"
        yield f"damaged and hostile files: {name}", tried, failed, figure


def kills(scale: float) -> Rows:
    for work in ("calibrate", "evaluate", "sweep", "search"):
        with tempfile.TemporaryDirectory() as folder:
            done = _run("tests/killed.py", folder, max(5, round(KILLS * scale)), work)
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            yield f"{work}, killed", 1, 1, "the run failed"
            continue
        told = json.loads(done.stdout)
        failed = sum((killed, resumed, same) != (9, 0, True) for _, killed, resumed, _, same in told["once"])
        ends, same = told["often"]
        figure = f"and one run killed {len(ends) - 1} times in a row: {'the same' if same else 'ANOTHER RESULT'}"
        yield f"{work}, killed once: the same result, bit for bit", len(told["once"]), failed + (not same), figure


def load(scale: float) -> Rows:
    from loads import growth

    for work, size, what in (("calibrate", BATCHES, "batches"), ("evaluate", INPUTS, "inputs")):
        size = max(150, round(size * scale)) if what == "batches" else max(2500, round(size * scale))
        done = _run("tests/loads.py", work, size)
        if done.returncode:
            print(done.stderr[-3000:], file=sys.stderr)
            yield f"{work}: memory", size, 1, "the run failed"
            continue
        found = json.loads(done.stdout)
        grown = growth(found)
        figure = f"{100 * grown:+.2f} % of {max(found) / 2**20:.0f} MB"
        yield f"{work}: memory grows by less than 1 % over so many {what}", size, int(grown >= 0.01), figure


PARTS = {"properties": properties, "hostile": hostile, "kills": kills, "load": load}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of cases (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="where the rows go, too")
    given = parser.parse_args(argv)
    if unknown := [part for part in given.parts if part not in PARTS]:
        parser.error(f"{unknown[0]!r}: choose from {', '.join(PARTS)}")
    rows: list[dict[str, Any]] = []
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for part in given.parts or PARTS:
        began = time.perf_counter()
        for values in PARTS[part](given.scale):
            spent, began = time.perf_counter() - began, time.perf_counter()
            rows.append(dict(zip(COLUMNS, (part, *values, f"{spent:.0f}"), strict=True)))
            print(f"| {' | '.join(map(str, rows[-1].values()))} |", flush=True)
    if given.csv:
        with given.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
