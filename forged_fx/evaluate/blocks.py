"""Work done block by block. A block is the unit of everything that is random: its work begins with the seed.

So what happens to an input follows from the seed and from the inputs that stand in its block, and from nothing else:
not from how many inputs the model is fed at a time, nor from what ran before.
"""

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

BLOCK = 250  # inputs; pyautoattack's own batch size, so that a row equals its figure

Outcome = dict[str, Tensor]  # what a block's work found, on the CPU


class Blocks:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def run(self, name: str, indices: Tensor, work: Callable[[Tensor], Outcome]) -> Iterator[tuple[Tensor, Outcome]]:
        """Yields (block, work(block)) for each block of `indices`, in order; "seconds" is added to the outcome.

        name: tells this work from all other in the evaluation. work: is given a block of indices, (k,) int64. Blocks
        must not depend on one another.
        """
        for block in indices.split(BLOCK) if len(indices) else ():
            began = time.perf_counter()
            torch.manual_seed(self.seed)
            outcome = work(block)
            yield block, outcome | {"seconds": torch.tensor(time.perf_counter() - began, dtype=torch.float64)}
