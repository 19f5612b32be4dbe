"""Compile ahead: in processes of their own, several at once, for the caches of Inductor and Triton on disk.

A process compiles one model after another, each mostly on one core, while a benchmark may measure only one thing at a
time. What was compiled ahead, the process that measures reads from the caches. Whatever goes wrong here, it meets
itself, and reports; so nothing is reported here.
"""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable

import torch
import torch._inductor.config

Job = Callable[[], object]  # that another process can be given: of functions that a module names


def ahead(jobs: Iterable[Job], at_once: int, ends: float) -> int:
    """Run the jobs, each in a new process; what runs at `ends`, of time.monotonic, is killed.

    Returns how many were not through, or failed. ValueError for less than one at once.
    """
    if at_once < 1:
        raise ValueError(f"{at_once} jobs at once: at least 1")
    start = multiprocessing.get_context("spawn").Process
    waiting, running, failed = deque(jobs), [], 0
    while time.monotonic() < ends:
        failed += sum(bool(process.exitcode) for process in running)
        running = [process for process in running if process.is_alive()]
        while waiting and len(running) < at_once:
            running.append(start(target=_quietly, args=(waiting.popleft(), torch.get_num_threads()), daemon=True))
            running[-1].start()
        if not running:
            return failed
        time.sleep(0.05)
    for process in running:
        process.kill()
        process.join()
    return len(running) + len(waiting) + failed


def _quietly(job: Job, threads: int) -> None:
    torch.set_num_threads(threads)  # (as they are part of what code is cached by)
    torch._inductor.config.compile_threads = 1  # a core each
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    job()
