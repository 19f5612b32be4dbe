"""Signs that the attacks failed rather than that the defence held: a table with a row per check.

Each is a figure and a bound, and is raised where the figure exceeds the bound. A raised finding of which `masking` is
True forbids the verdict "gain"; those of `verdict.FORBID` forbid "no measurable gain" too, and `verdict.BASE_DOUBTED`
forbids "loss". docs/findings.md says when each is raised and what to do. To add one: a function, a row, and a paragraph
there. Most are those of Carlini et al., On evaluating adversarial robustness (arXiv 1902.06705), section 5, and of
auto-attack's flags_doc.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from forged_fx.evaluate import scale
from forged_fx.evaluate.attacks import ATTACKS
from forged_fx.evaluate.further import round_of
from forged_fx.evaluate.probes import RADII, STEPS, BaseProbes, Probes, top_lead
from forged_fx.evaluate.result import Finding, Row, Side
from forged_fx.evaluate.statistics import beyond_chance
from forged_fx.evaluate.verdict import BASE_DOUBTED, FOREIGN, JUMPS, OUT_OF_REACH, REMEMBERS, SMALL, STUCK, UNBOUNDED

Measured = tuple[float, float] | str  # value and bound, or why there is none

DRIFT, APART, HIDDEN = 1e-4, 0.1, 0.01  # see `Probes`; the last is of `flat`, a share
LEAST = 1e-3  # lead of a class over the next, the median: 0.4 to 24 in trained networks
GUESSED = 0.85  # share of the inputs that guessing gets wrong; a model that gets more of them wrong knows other classes


@dataclass(frozen=True)
class Case:
    """What the checks look at. logits: the model's on all inputs, unattacked, (n, classes). training: how many of its
    modules were in train mode. outside: how many elements of x lie outside [0, 1]. scale: see `scale.of`.
    base_probes: of a base, if there is one. thresholds, jumps: see `reach.py`; past: see `past.py`."""

    model: Side
    base: Side | None
    same: bool
    logits: Tensor
    probes: Probes
    training: int
    outside: int
    scale: tuple[float, float] | None = None
    base_probes: BaseProbes = field(default_factory=BaseProbes)
    thresholds: Measured = (0, 0)
    jumps: Measured = (0, 0)
    past: Measured = (0, 0)

    @property
    def n(self) -> int:
        return len(self.model.broken_by)

    def taken(self, rows: Callable[[Row], bool]) -> tuple[float, float]:
        """How many examples these rows took from the model alone, and the most that chance explains."""
        lost = self.model.broken_in(rows)
        others = self.base.broken_in(rows) if self.base else torch.zeros_like(lost)
        taken, spared = int((lost & ~others).sum()), int((others & ~lost).sum())
        return taken, next((k for k in range(self.n) if beyond_chance(k + 1, spared, self.n)), self.n)


def _black_box(row: Row) -> bool:
    return row.attack in ATTACKS and not ATTACKS[row.attack].gradient


def _above_bpda(case: Case) -> Measured:
    if not any(row.kind == "BPDA" and row.attacked for row in case.model.rows):
        return "BPDA changes no gradient, or nothing stood when it began"
    return case.taken(lambda row: row.kind == "BPDA")


def _above_black_box(case: Case) -> Measured:
    rows = case.model.rows
    white = next((i for i, row in enumerate(rows) if row.kind == "true gradient" and not _black_box(row)), len(rows))
    if not any(_black_box(row) and row.attacked for row in rows[white:]):
        return "no black-box attack was run after one that uses a gradient"
    return case.taken(_black_box)


def _above_transfer(case: Case) -> Measured:
    if case.base is None:
        return "there is no base to transfer from"
    return case.taken(lambda row: row.kind == "transfer")


def _unfinished(case: Case) -> Measured:
    if not any(row.kind == "further" for row in case.model.rows):
        return "attacks='thorough' makes it"
    last = max(round_of(row.attack) for row in case.model.rows)  # what earlier rounds found, the last ones had at hand
    return case.taken(lambda row: row.kind == "further" and not _black_box(row) and round_of(row.attack) == last)


def _flat(case: Case) -> Measured:
    return _flat_share(case.probes), HIDDEN


def _stuck(case: Case) -> Measured:
    return case.probes.stuck / max(case.probes.probed, 1), HIDDEN


def _flat_share(probes: Probes | BaseProbes) -> float:
    return probes.flat / max(probes.probed, 1)


def _few(probes: Probes | BaseProbes) -> int:
    """One probed input in twenty, and one where they are fewer: what a few steps may miss."""
    return max(probes.probed // 20, 1)


def _rising(right: list[int]) -> int:
    """The largest rise from any entry to a later one, where each should be no larger than those before it."""
    return max(later - earlier for i, earlier in enumerate(right) for later in right[i:])


def _iterations(case: Case) -> Measured:
    return _rising(case.probes.by_steps), _few(case.probes)


def _radii(case: Case) -> Measured:
    return _rising(case.probes.by_radius), _few(case.probes)


def _randomised(case: Case) -> Measured:
    return max(case.probes.drift, case.base_probes.drift), DRIFT


def _apart(case: Case) -> Measured:
    return max(case.probes.apart, case.base_probes.apart), APART


def _whole_box(case: Case) -> Measured:
    return case.probes.by_radius[-1], _few(case.probes)


def exceeds(measured: Measured) -> bool:
    return not isinstance(measured, str) and measured[0] > measured[1]


def base_doubted(probes: BaseProbes) -> Measured:
    if not probes.probed:
        return "there is no base, or no input of it is right unattacked"
    signs = (
        probes.stand > _few(probes),
        probes.drift > DRIFT,
        probes.apart > APART,
        _flat_share(probes) > HIDDEN,
        probes.jumps,
        probes.lead < LEAST,
        probes.remembers,
    )
    return sum(signs), 0


def _probabilities(case: Case) -> Measured:
    """auto-attack's check_range_output; but sums may be as far off as those of a softmax in half precision are."""
    out, slack = case.logits, 1e-5
    proper = (out > -slack).all(1) & (out < 1 + slack).all(1) & ((out.sum(1) - 1).abs() < 5e-3)
    return float(proper.double().mean()), 0.5


def _clipped(case: Case) -> Measured:
    """Logits that share the largest or the smallest value of all, beyond one of each. (Of log-probabilities, the
    smallest: the largest is 0 where a model is sure.)"""
    out = case.logits
    logarithms = bool((out.logsumexp(1).abs() < 5e-3).all())
    limits = [out.min()] if logarithms else [out.min(), out.max()]
    return float(sum((out == limit).sum() - 1 for limit in limits)) / out.numel(), 0.01


def foreign(plain: Side, classes: int) -> tuple[float, float]:
    """The share of inputs that a model, which is to know these classes, gets wrong unattacked."""
    return 1 - plain.accuracy("natural"), GUESSED * (1 - 1 / classes)


def small(logits: Tensor) -> tuple[float, float]:
    """How small the logits (n, classes) are: 1 over the median `top_lead`."""
    return 1 / max(top_lead(logits), 1e-30), 1 / LEAST


def _scale(case: Case) -> Measured:
    if case.scale is None:
        return "no site that forged_fx.transform has forged is seen to run"
    apart = scale.times_apart(case.scale)
    return "nothing but zeros enters the first forged site" if apart is None else (apart, scale.APART)


@dataclass(frozen=True)
class Check:
    name: str
    measure: Callable[[Case], Measured]
    unit: str
    masking: bool = True
    probing: bool = False  # it needs inputs that are right unattacked


CHECKS = (
    Check("true gradient above BPDA", _above_bpda, "inputs that BPDA broke"),
    Check("white box above black box", _above_black_box, "inputs that black-box attacks broke"),
    Check("white box above transfer", _above_transfer, "inputs that transfer broke"),
    Check("attack unfinished", _unfinished, "inputs that longer attacks broke"),
    Check(OUT_OF_REACH, lambda case: case.thresholds, "thresholds that no gradient sees through"),
    Check(JUMPS, lambda case: case.jumps, "share of the logits' changes, the median"),
    Check(
        FOREIGN, lambda case: foreign(case.base or case.model, case.logits.shape[1]), "share of inputs wrong unattacked"
    ),
    Check("zero gradient", _flat, "share of probed inputs", probing=True),
    Check(STUCK, _stuck, "share of probed inputs", probing=True),
    Check("accuracy rises with iterations", _iterations, f"probed inputs, at {STEPS} steps", probing=True),
    Check("accuracy rises with eps", _radii, f"probed inputs, at {RADII} eps and the whole box", probing=True),
    Check(UNBOUNDED, _whole_box, "probed inputs that stand", probing=True),
    Check(BASE_DOUBTED, lambda case: base_doubted(case.base_probes), "of seven signs"),
    Check("loss not finite", lambda case: (case.probes.sick, 0), "logits and gradients", probing=True),
    Check("output is a probability", _probabilities, "share of inputs"),
    Check("logits clipped", _clipped, "share of logits at a limit"),
    Check(SMALL, lambda case: small(case.logits), "1 over the lead of a class over the next, the median"),
    Check("output randomised", _randomised, "distance of scaled logits", probing=True),
    Check("output depends on the batch", _apart, "share of inputs", probing=True),
    Check(REMEMBERS, lambda case: case.past, "distance of scaled logits"),
    Check(
        "examples outside the ball", lambda case: (sum(row.rejected for row in case.model.rows), 0), "examples", False
    ),
    Check("train mode", lambda case: (case.training, 0), "modules", False),
    Check("inputs outside [0, 1]", lambda case: (case.outside, 0), "elements", False),
    Check("calibrated on another scale", _scale, "times as large or small at the first forged site", False),
    Check(
        "base and model identical",
        lambda case: (float(case.same), 0) if case.base else "there is no base",
        "0 or 1",
        False,
    ),
)


def examine(case: Case) -> list[Finding]:
    """Every check, in the table's order."""
    return [_made(check, case) for check in CHECKS]


def _made(check: Check, case: Case) -> Finding:
    idle = check.probing and not case.probes.probed
    measured = "no input is right unattacked" if idle else check.measure(case)
    if isinstance(measured, str):
        return Finding(check.name, None, 0.0, check.unit, False, check.masking, f"not made: {measured}")
    value, bound = (float(figure) for figure in measured)
    return Finding(check.name, value, bound, check.unit, value > bound, check.masking)
