"""Whether a model answers as it did before it was asked anything.

One that remembers (a cache of its answers, statistics that it goes on taking) may withstand the attacks of this run,
and be broken by what they found wherever it runs anew.
"""

import json

import torch
from torch import Tensor, nn

from forged_fx.checked import in_a_line
from forged_fx.evaluate import answers
from forged_fx.evaluate.compiled import Eager, is_compiled
from forged_fx.evaluate.findings import DRIFT, Measured
from forged_fx.evaluate.gradients import Logits
from forged_fx.evaluate.harness import Subject
from forged_fx.evaluate.probes import scaled
from forged_fx.randomness import seeded


def depends(side: Subject, other: Subject | None, drift: float) -> Measured:
    """How far the answers of the side's model lie from those that it would give if it had been asked nothing: of scaled
    logits the largest distance, on the example found of each input, or a point of its ball, and then on the inputs."""
    if isinstance(side.fresh, str):
        return side.fresh
    if drift > DRIFT:
        return "its output is randomised"
    model, twin = side.attacked, side.fresh
    if isinstance(twin, nn.DataParallel):
        twin = twin.module
    if isinstance(model, Eager):
        twin = Eager(twin)
    elif is_compiled(model):
        return "it is compiled, and another function eagerly"
    points = answers.moved(side.x, side.threat)
    for one in (other, side):
        if one is not None:
            found = (one.broken_by > 0).to(points.device)
            points[found] = one.examples[found]
    # The points first: asked the inputs before, a copy that remembers would answer as the model does.
    parts = (*points.split(side.batch_size), *side.x.split(side.batch_size))
    far: float | str
    try:
        far = max(_apart(model, twin, part, side) for part in parts)
    except Exception as error:  # the model's own hooks, say, know the modules that they were set on, and no copies
        far = f"its copy from before it was asked does not run ({in_a_line(error)})"
    # each process's model was asked something else
    told = [*map(json.loads, side.blocks.processes.gather(json.dumps(far).encode(), f"{side.name} asked before"))]
    return next((why for why in told if isinstance(why, str)), None) or (max(told), DRIFT)


def _apart(model: nn.Module, twin: nn.Module, x: Tensor, side: Subject) -> float:
    found = []
    for one in (model, twin):
        with torch.no_grad(), seeded(0):  # a model may draw
            found.append(scaled(Logits(one)(x.to(side.device))))
    return float((found[0] - found[1]).norm(dim=1).max())
