"""Work done block by block. A block is the unit of everything that is random: its work begins with the seed.

So what happens to an input follows from the seed and from the inputs that stand in its block, and from nothing else:
not from how many inputs the model is fed at a time, nor from what ran before, nor from which process does the work.
That is why a block's outcome may come from the journal of an earlier run, or from another process.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from forged_fx.evaluate.gradients import centred
from forged_fx.evaluate.journal import Journal, pack
from forged_fx.extras import need
from forged_fx.processes import Processes, attempt, result
from forged_fx.randomness import seed

BLOCK = 250  # inputs; pyautoattack's own batch size, so that a row equals its figure
ROUNDING = 1e-3  # share of the largest logit by which two runs of one model may differ: TF32 keeps 10 bits

Outcome = dict[str, Tensor]  # what a block's work found, on the CPU
Fields = dict[str, tuple[torch.dtype, int | None]]  # what an outcome holds: dtype, number of dimensions (None: any)
OWN: Fields = {"block": (torch.int64, 1), "seconds": (torch.float64, 0)}


def misfits(outcome: Outcome, fields: Fields) -> str:
    """The fields that an outcome lacks, has beside those, or has of another dtype or number of dimensions."""

    def fits(key: str) -> bool:
        if key not in outcome or key not in fields:
            return False
        dtype, dim = fields[key]
        return outcome[key].dtype == dtype and dim in (None, outcome[key].dim())

    return ", ".join(sorted(key for key in outcome.keys() | fields.keys() if not fits(key)))


def near(old: Tensor, new: Tensor) -> bool:
    """Whether two runs of one model may have given them; NaN is near nothing."""
    return old.shape == new.shape and bool(((old - new).abs() <= ROUNDING * old.abs().max()).all())


def same_logits(old: Tensor, new: Tensor) -> bool:
    """The same of logits (n, classes), and of what tells the classes apart."""
    return near(old, new) and near(centred(old), centred(new))


@dataclass(frozen=True)
class Job:
    """The same work on every block of some inputs.

    name: tells it from all other in the run. indices: the inputs, (n,) int64. work: is given a block of them, (k,); it
    must depend on nothing that another block's work changes. fields: what its outcome holds, by which what comes from
    the journal is checked; None: it is not kept there.
    """

    name: str
    indices: Tensor
    work: Callable[[Tensor], Outcome]
    fields: Fields | None


@dataclass(frozen=True)
class Task:
    """One block of a job: the number-th."""

    job: Job
    number: int
    block: Tensor


class Blocks:
    """journal: where finished blocks are kept, in process 0 if at all."""

    def __init__(self, seed: int, processes: Processes | None = None) -> None:
        self.seed, self.processes = seed, processes or Processes()
        self.journal: Journal | None = None

    def run(
        self, name: str, indices: Tensor, work: Callable[[Tensor], Outcome], fields: Fields | None
    ) -> Iterator[tuple[Tensor, Outcome]]:
        """Yields (block, work(block)) for each block of a `Job`, in order; "seconds" is added to the outcome."""
        for _, block, outcome in self.run_all([Job(name, indices, work, fields)]):
            yield block, outcome

    def run_all(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Tensor, Outcome]]:
        """Several jobs that do not depend on each other: the first block of each, then the second of each, and so on.
        So of as many processes as jobs each has one."""
        blocks = [job.indices.split(BLOCK) if len(job.indices) else () for job in jobs]
        rounds = range(max(map(len, blocks), default=0))
        tasks = [Task(job, k, mine[k]) for k in rounds for job, mine in zip(jobs, blocks, strict=True) if k < len(mine)]
        known = {job.name: self._known(job, len(mine)) for job, mine in zip(jobs, blocks, strict=True)}
        todo = [task for task in tasks if task.number not in known[task.job.name]]
        done: dict[tuple[str, int], bytes] = {}
        for task in tasks:
            name, number = key = task.job.name, task.number
            if number in known[name]:
                data = self.processes.first(partial(known[name].get, number))
            else:
                if key not in done:
                    team, todo = todo[: self.processes.size], todo[self.processes.size :]
                    done = self._together(team)
                data = done[key]
            outcome, fields = need("safetensors.torch").load(data), task.job.fields
            if fields and (wrong := misfits(outcome, fields | OWN)):
                raise ValueError(f"{name}: its file in the unfinished run holds {wrong}; choose another folder")
            if fields and not 0 <= float(outcome["seconds"]) < math.inf:
                raise ValueError(f"{name}: its file in the unfinished run says that it took {outcome['seconds']:g} s")
            if not torch.equal(outcome.pop("block"), task.block):
                raise ValueError(
                    f"{name}: other inputs stand than in the unfinished run, so the model's code or its arithmetic "
                    "has changed since; choose another folder"
                )
            yield task.job, task.block, outcome

    def _known(self, job: Job, count: int) -> dict[int, bytes]:
        """What the journal has; in processes other than 0 the numbers only."""
        if not job.fields:
            return {}
        mine = self.journal.recall(job.name, count) if self.journal else {}
        numbers = self.processes.first(lambda: b"".join(number.to_bytes(8, "big") for number in mine))
        return {k: mine.get(k, b"") for k in (int.from_bytes(numbers[i : i + 8]) for i in range(0, len(numbers), 8))}

    def _together(self, team: list[Task]) -> dict[tuple[str, int], bytes]:
        """Each process does one task of the team; all get all outcomes."""

        def mine() -> bytes:
            task = team[self.processes.rank]
            return self._do(task.block, task.job.work)

        error, answer = attempt(mine) if self.processes.rank < len(team) else (None, b"")
        # What they are at goes along: of processes that went different ways, each answer would stand for another's.
        at = json.dumps([(task.job.name, task.number) for task in team]).encode()
        told = [data.partition(b"\n") for data in self.processes.gather(at + b"\n" + answer, team[0].job.name)]
        if apart := [there for there, _, _ in told if there != at]:
            raise RuntimeError(
                f"the processes that share a run are at different work: {at.decode()}, and {apart[0].decode()}"
            )
        answers = [answer for _, _, answer in told[: len(team)]]
        for task, answer in zip(team, answers, strict=True):
            if self.journal and task.job.fields and answer[:1] == b"+":
                self.journal.keep(task.job.name, task.number, answer[1:])
        if error:
            raise error
        who = f"process {{}} of {self.processes.size}, {{}}"
        return {
            (task.job.name, task.number): result(answer, who.format(rank, task.job.name))
            for rank, (task, answer) in enumerate(zip(team, answers, strict=True))
        }

    def _do(self, block: Tensor, work: Callable[[Tensor], Outcome]) -> bytes:
        began = time.perf_counter()
        seed(self.seed)
        outcome = {**work(block), "block": block}
        outcome["seconds"] = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        return pack(outcome)

    def unchanged(self, name: str, value: Tensor, alike: Callable[[Tensor, Tensor], bool]) -> bool:
        """Whether `value` is, but for rounding, what it was when this run began; the first time it is kept."""

        def before() -> bytes:
            if not self.journal:
                return b""
            known = self.journal.recall(name, 1)
            if not known:
                self.journal.keep(name, 0, pack({"value": value}))
            return known.get(0, b"")

        data = self.processes.first(before)
        if not data:
            return True
        old = need("safetensors.torch").load(data).get("value")
        if old is None or (old.shape, old.dtype) != (value.shape, value.dtype):
            return False
        return alike(old, value)
