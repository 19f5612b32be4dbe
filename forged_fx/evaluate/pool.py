"""Many models made from one base, judged together: each faces the examples that were found on any of them.

`evaluate` is the case of one model. Here the base is attacked once, whatever the number of models, and no model looks
better than another for having been attacked less.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from forged_fx.evaluate import checks
from forged_fx.evaluate.attacks import Plan, Setting
from forged_fx.evaluate.blocks import Blocks
from forged_fx.evaluate.gradients import Context
from forged_fx.evaluate.harness import Subject
from forged_fx.evaluate.protocol import contest
from forged_fx.evaluate.report import Progress
from forged_fx.evaluate.result import Side
from forged_fx.evaluate.threat import Threat


@contextmanager
def at_peace(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """The models in eval mode and without gradients of their parameters, the caller's modes and random numbers kept;
    afterwards all is as it was."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(checks.own_random_numbers())
        for name, model in models.items():
            stack.enter_context(checks.borrowed(model, name))
        yield


def judge(
    models: Mapping[str, nn.Module],
    x: Tensor,
    y: Tensor,
    threat: Threat,
    plan: Plan,
    *,
    bpda: Context,
    blocks: Blocks,
    batch_size: int,
    progress: Progress,
) -> dict[str, Side]:
    """Name -> outcome of every model; the first is the base. To be called within `at_peace`.

    x (n, ...) float32 and y (n,) int64, as `checks.inputs` returns them. The rows are those of `evaluate`.
    """
    sides = [Subject(name, model, x, y, threat, batch_size, blocks, progress) for name, model in models.items()]
    classes: int | None = None
    for side in sides:
        classes = side.natural(classes).shape[1]
    settings = {
        side.name: Setting(threat, classes or 0, tuple(x.shape[1:]), blocks.seed, batch_size, side.device)
        for side in sides
    }
    contest(sides, plan, settings, bpda)
    return {side.name: side.side() for side in sides}
