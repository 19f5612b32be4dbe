"""Work done block by block. A block is the unit of everything that is random: its work begins with the seed.

So what happens to an input follows from the seed and from the inputs that stand in its block, and from nothing else:
not from how many inputs the model is fed at a time, nor from what ran before, nor from which process does the work.
That is why a block's outcome may come from the journal of an earlier run, or from another process.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from forged_fx.evaluate.extras import need
from forged_fx.evaluate.journal import Journal, pack
from forged_fx.processes import Processes, attempt, result

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


class Blocks:
    """journal: where finished blocks are kept, in process 0 if at all."""

    def __init__(self, seed: int, processes: Processes | None = None, journal: Journal | None = None) -> None:
        self.seed, self.processes, self.journal = seed, processes or Processes(), journal

    def run(
        self, name: str, indices: Tensor, work: Callable[[Tensor], Outcome], fields: Fields | None
    ) -> Iterator[tuple[Tensor, Outcome]]:
        """Yields (block, work(block)) for each block of `indices`, in order; "seconds" is added to the outcome.

        name: tells this work from all other in the evaluation. work: is given a block of indices, (k,) int64; it must
        depend on nothing that another block's work changes. fields: what its outcome holds, by which what comes
        from the journal is checked; None: it is not kept there.
        """
        blocks = indices.split(BLOCK) if len(indices) else ()
        journal = self.journal if fields else None
        known = self._known(journal, name, len(blocks)) if fields else {}
        todo = [number for number in range(len(blocks)) if number not in known]
        done: dict[int, bytes] = {}
        for number, block in enumerate(blocks):
            if number in known:
                data = self.processes.first(lambda number=number: known[number])
            else:
                if number not in done:
                    team, todo = todo[: self.processes.size], todo[self.processes.size :]
                    done = self._together(journal, name, team, blocks, work)
                data = done[number]
            outcome = need("safetensors.torch").load(data)
            if fields and (wrong := misfits(outcome, fields | OWN)):
                raise ValueError(f"{name}: its file in the unfinished run holds {wrong}; choose another folder")
            if not torch.equal(outcome.pop("block"), block):
                raise ValueError(
                    f"{name}: other inputs stand than in the unfinished run, so the model's code or its arithmetic "
                    "has changed since; choose another folder"
                )
            yield block, outcome

    def _known(self, journal: Journal | None, name: str, count: int) -> dict[int, bytes]:
        """What the journal has; in processes other than 0 the numbers only."""
        mine = journal.recall(name, count) if journal else {}
        numbers = self.processes.first(lambda: b"".join(number.to_bytes(8, "big") for number in mine))
        return {k: mine.get(k, b"") for k in (int.from_bytes(numbers[i : i + 8]) for i in range(0, len(numbers), 8))}

    def _together(
        self,
        journal: Journal | None,
        name: str,
        team: list[int],
        blocks: tuple[Tensor, ...],
        work: Callable[[Tensor], Outcome],
    ) -> dict[int, bytes]:
        """Each process does one block of the team; all get all outcomes."""

        def mine() -> bytes:
            return self._do(blocks[team[self.processes.rank]], work)

        error, answer = attempt(mine) if self.processes.rank < len(team) else (None, b"")
        answers = self.processes.gather(answer, name)[: len(team)]
        if journal:
            for number, answer in zip(team, answers, strict=True):
                if answer[:1] == b"+":
                    journal.keep(name, number, answer[1:])
        if error:
            raise error
        who = f"process {{}} of {self.processes.size}, {name}"
        return {k: result(answer, who.format(rank)) for rank, (k, answer) in enumerate(zip(team, answers, strict=True))}

    def _do(self, block: Tensor, work: Callable[[Tensor], Outcome]) -> bytes:
        began = time.perf_counter()
        torch.manual_seed(self.seed)
        outcome = {**work(block), "block": block}
        outcome["seconds"] = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        return pack(outcome)

    def unchanged(self, name: str, value: Tensor) -> bool:
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
        if old is None or old.shape != value.shape:
            return False
        return torch.allclose(old, value, rtol=0, atol=ROUNDING * float(old.abs().max()))
