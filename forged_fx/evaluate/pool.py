"""Many models made from one base, judged together: each faces the examples that were found on any of them.

`evaluate` is the case of one model. Here the base is attacked once, whatever the number of models, and no model looks
better than another for having been attacked less.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from forged_fx.bpda import straight_through
from forged_fx.evaluate import past, reach
from forged_fx.evaluate.attacks import Plan
from forged_fx.evaluate.blocks import Blocks
from forged_fx.evaluate.compiled import ROUNDING
from forged_fx.evaluate.findings import Case, Measured, base_doubted, examine, exceeds, foreign, small
from forged_fx.evaluate.gradients import Context
from forged_fx.evaluate.harness import Subject
from forged_fx.evaluate.probes import probe, probe_base
from forged_fx.evaluate.protocol import contest, with_more
from forged_fx.evaluate.result import Side, doubts, judged
from forged_fx.evaluate.terminal import Progress
from forged_fx.evaluate.threat import Threat
from forged_fx.evaluate.verdict import BASE_DOUBTED, FOREIGN, JUMPS, OUT_OF_REACH, SMALL


@dataclass(frozen=True)
class Judged:
    """A model's outcome, and what `evaluate` would say of it beside the base; of the base itself: "". same: it gave the
    base's logits, bit for bit, wherever the two were asked."""

    side: Side
    verdict: str = ""
    sentence: str = ""
    same: bool = False


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
    distinct: Tensor,
) -> dict[str, Judged]:
    """Name -> outcome of every model; the first is the base. To be called within `checks.at_peace`.

    x (n, ...) float32 and y (n,) int64, as `checks.inputs` returns them; distinct: as in `Result`. The rows are those
    of `evaluate`.
    """
    sides = [Subject(name, model, x, y, threat, batch_size, blocks, progress) for name, model in models.items()]
    classes, logits = None, []
    for side in sides:
        logits.append(side.natural(classes))
        classes = logits[0].shape[1]
    settings = {side.name: side.setting(classes) for side in sides}
    contest(sides, plan, settings, bpda)
    base = sides[0].side()
    found = {base.name: Judged(base)}
    base_probes = with_more(probe_base(sides[0], settings[base.name], bpda), sides[0])
    of_base: dict[str, Measured] = {FOREIGN: foreign(base, logits[0].shape[1]), BASE_DOUBTED: base_doubted(base_probes)}
    for side, mine in zip(sides[1:], logits[1:], strict=True):
        apart = reach.apart(side, sides[0], mine, logits[0])
        same, alike, outcome = apart == 0, apart <= ROUNDING, side.side()
        measured = of_base | {
            OUT_OF_REACH: reach.thresholds(side, bpda is straight_through, alike),
            JUMPS: reach.jumps(side, sides[0], alike),
            SMALL: small(mine),
        }
        raised = [name for name, figures in measured.items() if exceeds(figures)]
        known = {"complete": plan.complete, "same": same, "distinct": distinct}
        verdict = judged(outcome, base, **known, doubts=raised)
        if verdict[0] in ("gain", "no measurable gain"):  # else no other finding changes it: the probes are spared
            probes = probe(side, settings[side.name], bpda)
            case = Case(
                outcome, base, same, mine, probes, training=0, outside=0, base_probes=base_probes,
                thresholds=measured[OUT_OF_REACH], jumps=measured[JUMPS],
                past=past.depends(side, sides[0], probes.drift),
            )  # fmt: skip
            verdict = judged(outcome, base, **known, doubts=doubts(examine(case)))
        found[side.name] = Judged(outcome, *verdict, same)
    return found
