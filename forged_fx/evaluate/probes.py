"""What is measured on a model to find out whether attacks on it can be trusted: a few dozen inputs, a few steps.

`findings.py` compares it with bounds. All of it costs about as much as a tenth of one AutoAttack row on as many inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from forged_fx.evaluate import further
from forged_fx.evaluate.attacks import Setting, toolbox
from forged_fx.evaluate.blocks import Outcome
from forged_fx.evaluate.gradients import Context, Logits, centred, gradient, loss_gradient
from forged_fx.evaluate.harness import Subject

PROBED = 64  # inputs, the first that are right unattacked
STEPS = (3, 10, 30)  # of APGD, at the radius of the evaluation
RADII = (0.5, 1.0, 2.0, 4.0)  # in units of that radius, each with `STEPS[1]` steps; then the whole box
REPEATS = 5
SHARED = 2**-12  # part of the logits' size that is told from the rounding of what their classes share
TAME = 10.0  # what no logits are beyond, where an attack may change everything
COUNT, SHARE, SWEEP = (torch.int64, 0), (torch.float64, 0), (torch.int64, 1)
FIELDS = {"flat": COUNT, "stuck": COUNT, "sick": COUNT, "drift": SHARE, "apart": SHARE, "steps": SWEEP, "radii": SWEEP}
OF_BASE = {"drift": SHARE, "apart": SHARE, "stand": COUNT, "flat": COUNT, "lead": SHARE}


@dataclass(frozen=True)
class Probes:
    """probed: how many inputs. flat: of these, with a true gradient that is all zeros; stuck: with such a one under
    BPDA, too. sick: with a NaN or an infinity in logits or gradient, counted at each point visited. drift: largest
    distance between logits (scaled to length 1) of one input, or of a point of its ball, asked `REPEATS` times; apart:
    share of inputs whose scaled logits move by more than 0.001 in smaller batches. by_steps, by_radius: how many are
    still right after APGD, in the order of `STEPS`, and of `RADII` and the whole box.
    """

    probed: int
    flat: int
    sick: int
    drift: float
    apart: float
    by_steps: list[int]
    by_radius: list[int]
    seconds: float = 0.0
    stuck: int = 0


def probe(side: Subject, setting: Setting, bpda: Context) -> Probes:
    """Ask the side's model. Its natural row must have been run."""
    right = (side.broken_by != 0).nonzero().flatten()[:PROBED]  # 0: wrong without attack

    def ask(indices: Tensor) -> Outcome:
        x, y = side.inputs(indices)
        logits = Logits(side.attacked, side.batch_size)
        uphill = loss_gradient(logits, x, y)
        flat = (uphill == 0).flatten(1).all(1)
        through = loss_gradient(Logits(side.attacked, side.batch_size, bpda), x, y) if flat.any() else uphill
        drifted, apart = _asked_again(side, x)
        watched = _Watched(Logits(side.attacked, side.batch_size, bpda))
        steps = [_apgd(watched, x, y, setting, 1.0, n) for n in STEPS]
        whole = _whole_box(setting, x)
        reach = [*(min(r, whole) for r in RADII), whole]
        radii = [steps[1] if r == 1 else _apgd(watched, x, y, setting, r, STEPS[1]) for r in reach[:-1]]
        radii.append(_apgd(_tamed(watched, x), x, y, setting, whole, STEPS[1]))
        sick = watched.sick + int((~torch.isfinite(uphill)).flatten(1).any(1).sum())
        return {
            "flat": flat.sum().cpu(),
            "stuck": (flat & (through == 0).flatten(1).all(1)).sum().cpu(),
            "sick": torch.tensor(sick),
            "drift": drifted,
            "apart": apart,
            "steps": torch.tensor(steps),
            "radii": torch.tensor(radii),
        }

    for _, found in side.blocks.run(f"{side.name} probes", right, ask, FIELDS):  # one block, or none
        figures = {key: found[key].item() for key in ("flat", "stuck", "sick", "drift", "apart", "seconds")}
        return Probes(len(right), **figures, by_steps=found["steps"].tolist(), by_radius=found["radii"].tolist())
    return Probes(0, 0, 0, 0.0, 0.0, [0] * len(STEPS), [0] * (len(RADII) + 1))


@dataclass(frozen=True)
class BaseProbes:
    """Of a base, on which attacks that fail find less, which would be another model's gain, or loss. probed, drift and
    apart as in `Probes`; stand: how many are still right after APGD in the whole box; flat: how many have a gradient
    that is all zeros, of the logits (a loss's is, where they are large); lead: see `top_lead`; jumps: see
    `reach.base_jumps`; remembers: its answers depend on what it was asked before."""

    probed: int = 0
    drift: float = 0.0
    apart: float = 0.0
    stand: int = 0
    flat: int = 0
    lead: float = 1.0
    jumps: bool = False
    remembers: bool = False


def probe_base(side: Subject, setting: Setting, bpda: Context) -> BaseProbes:
    """Ask the base. Its natural row must have been run."""
    right = (side.broken_by != 0).nonzero().flatten()[:PROBED]

    def ask(indices: Tensor) -> Outcome:
        x, y = side.inputs(indices)
        drifted, apart = _asked_again(side, x)
        logits = Logits(side.attacked, side.batch_size, bpda)
        stand = _apgd(_tamed(logits, x), x, y, setting, _whole_box(setting, x), STEPS[1])
        flat = (gradient(logits, x) == 0).flatten(1).all(1).sum().cpu()
        lead = torch.tensor(top_lead(logits(x)), dtype=torch.float64)
        return {"drift": drifted, "apart": apart, "stand": torch.tensor(stand), "flat": flat, "lead": lead}

    for _, found in side.blocks.run(f"{side.name} probes", right, ask, OF_BASE):  # one block, or none
        return BaseProbes(len(right), **{key: found[key].item() for key in OF_BASE})
    return BaseProbes()


def _asked_again(side: Subject, x: Tensor) -> tuple[Tensor, Tensor]:
    """`drift` and `apart`. A model that rounds at random may do so only where an attacker goes, off the values that
    pixels have; so points of the ball are asked, too."""
    aside = side.threat.step(x, (torch.rand(x.shape) - 0.5).to(x.device))
    together = Logits(side.attacked, side.batch_size)
    smaller = Logits(side.attacked, max(1, min(side.batch_size, len(x)) // 2))
    drifts, moved = [], []
    for points in (x, x + 0.77 * (aside - x)):
        first, *others = [scaled(together(points)) for _ in range(REPEATS)]
        drifts += [(first - other).norm(dim=1).max() for other in others]
        moved.append((first - scaled(smaller(points))).norm(dim=1) > 1e-3)
    return torch.stack(drifts).max(), torch.cat(moved).double().mean()


def top_lead(logits: Tensor) -> float:
    """By how much the largest logit leads the next, the median of inputs; whatever is masked lies below both."""
    first, second = logits.double().topk(2, 1).values.T
    return float((first - second).median())


def _tamed(logits: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """The logits in a size in which the cross-entropy has a gradient: divided, if any on x is above 10 (`TAME`)."""
    with torch.no_grad():
        size = max(1.0, float(logits(x).abs().nan_to_num(0, 0, 0).max()) / TAME)
    return lambda at: logits(at) / size


def _whole_box(setting: Setting, x: Tensor) -> float:
    """The radius of a ball that holds the box, in units of the evaluation's."""
    return setting.threat.diameter(x[0].numel()) / setting.threat.eps


class _Watched:
    """Logits that count what is not finite; it is shown to attacks as it is."""

    def __init__(self, logits: Logits) -> None:
        self.logits, self.sick = logits, 0

    def __call__(self, x: Tensor) -> Tensor:
        out = self.logits(x)
        self.sick += int((~torch.isfinite(out.detach())).any(1).sum())
        return out


def scaled(logits: Tensor) -> Tensor:
    """To length 1, as auto-attack's check_randomized does, less what classes share: a difference then means the same
    for every model."""
    logits = logits.detach().cpu().double().nan_to_num(0.0, 0.0, 0.0)  # (of 1e20 the length is beyond float32)
    apart, size = centred(logits), logits.norm(dim=1, keepdim=True)
    return apart / (apart.norm(dim=1, keepdim=True).maximum(SHARED * size) + 1e-10)


def _apgd(logits: Any, x: Tensor, y: Tensor, setting: Setting, radius: float, steps: int) -> int:
    """How many are right after so many steps of APGD on the cross-entropy, with one start."""
    threat = replace(setting.threat, eps=radius * setting.threat.eps)
    tools = toolbox(logits, replace(setting, threat=threat))
    further.set_steps(tools.apgd, steps)
    tools.apgd.loss, tools.apgd.n_restarts = "ce", 1
    found = tools.apgd.perturb(x.clone(), y.clone())
    return int((logits(found).max(1)[1] == y).sum())
