"""From figures to one word, and one plain sentence.

The verdicts, and the rule for each; the first rule that holds decides:

| verdict | when |
|---|---|
| cannot say | no attack was run on what stands unattacked |
| cannot say | fewer than 6 inputs: whatever the outcome, it could be chance |
| masking | the true gradient shows a gain, and rows that do not follow it take a measurable part of what it left |
| cannot say | no base to compare with |
| cannot say | the model is measurably below its base, but there are signs that attacks on the base failed |
| loss | in the worst case the model is measurably below its base |
| cannot say | no measurable loss, but a finding of `FORBID` is raised: that there is none is not known |
| cannot say | a measurable gain, but not all of AutoAttack's attacks were run (see below) |
| cannot say | a measurable gain, but a finding that forbids it is raised (`findings.py`) |
| gain | in the worst case the model is measurably above its base |
| cannot say | too few inputs: a gain of more than 5 points is as possible as none |
| no measurable gain | everything else |

*Measurably*: exact McNemar p <= 0.05, and 0 outside Tango's 95 % interval (`statistics.py`).

*Shows a gain*: more examples stand under the true gradient than do for the base; by one is enough, because that is
the figure that would be printed. Without a base the true gradient's figure is itself the claim. Where no attack
followed that gradient there is no such figure, and nothing that it could hide.

*All of AutoAttack*: some of its attacks are not defined for some inputs (Square takes images, apgd-t four classes). A
gain then takes all else that there is, `attacks="relentless"`, and the sentence says what is missing.

*Take a measurable part*: what BPDA, transfer and further attacks break, but for further attacks along the true
gradient: those find what it shows, given longer. All are a second round of attacks, and a second round breaks an
example or two by its new random starts alone (on five plain networks, where it repeats the first: 0 to 3 of 300 to
500). So the examples that it takes from the model alone are set against those that it takes from the base alone, in a
one-sided sign test at 5 % (5 against 0, 7 against 1), and must exceed 0.2 % of n, the bound at which auto-attack
itself warns that an attack found what the others should have found. Below that the verdict rests on the worst case: a
gain of one example that vanishes is no measurable gain, and no accusation.

Masking forbids a gain even where the worst case is measurably above the base: a model whose gradient is known to
hide adversarial examples has been shown to stand against these attacks only.

Logits too small for the cross-entropy (`SMALL`) are no masking, whatever they seem to hide: another size of them, and
nothing may be hidden.

*Inputs* that are copies of others count in no test and no interval (`copies.py`).

*Too few*: the upper end of the interval of the worst case's difference lies above 5 points, as it does for two models
that agree on fewer than 73 inputs. The sentence says which number of inputs would decide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forged_fx.evaluate.statistics import Paired, beyond_chance

ENOUGH = 6  # 6 against 0 is the least that the exact test calls beyond chance
MARGIN = 0.05  # a gain that "no measurable gain" must rule out

OUT_OF_REACH = "thresholds out of reach"
JUMPS = "gradient does not add up"
FOREIGN = "labels of other classes"
UNBOUNDED = "unbounded attack fails"
STUCK = "zero gradient under BPDA"
SMALL = "logits too small"
REMEMBERS = "output depends on what was asked before"
BASE_DOUBTED = "attacks on the base fail"
# Findings that leave nothing to be said in the model's favour, not even that it did not measurably lose; and why.
FORBID = {
    OUT_OF_REACH: "the model holds thresholds, and no attack saw through them (it was traced, decomposed or compiled "
    "with them, or runs them in its own threads, where no BPDA reaches): judge the forged model that it was made from, "
    "or pass bpda=",
    JUMPS: "the model jumps where its gradient knows nothing of it, and no attack saw through that: judge the model "
    "that it was traced or exported from, or pass bpda=, under which its backward is the straight-through one",
    FOREIGN: "unattacked it, or its base, is hardly better than guessing: the labels are probably not the classes that "
    "it was trained on, or in another order, or its inputs have to be normalised (--normalize in a terminal); look at "
    "what it predicts for some inputs",
    UNBOUNDED: "an attack that may change everything leaves the model right, so that its gradient leads nowhere: an "
    "attack of its own has to be written, or bpda= passed, under which its backward is the straight-through one",
    STUCK: "half of the attacks had a zero gradient to follow: divide logits that are large by a constant, which "
    "changes no prediction; else pass bpda=, under which its backward is the straight-through one",
    SMALL: "its logits are too small for the cross-entropy to tell a step that helps, which half of the attacks climb: "
    "multiply them by a constant, which changes no prediction",
    REMEMBERS: "its answers depend on what it was asked before, so that what attacks found here need not hold where it "
    "runs anew: judge it without its memory (a cache of answers, statistics that it takes in eval mode too)",
}


@dataclass(frozen=True)
class Evidence:
    """Counts of n examples. `true` and `worst`: right under the true gradient's rows, and under all rows.

    taken: examples that rows which do not follow the true gradient took from the model but not from the base, after
    those that do; spared: from the base but not from the model. finders: those rows, in words. doubts: names of raised
    findings that forbid a gain. idle: nothing was attacked. followed: an attack followed the true gradient. undefined:
    what of AutoAttack the inputs rule out, in words; relentless: all else was run. distinct: how many of the n are no
    copies of others (None: all), of which alone are taken, spared and paired.
    """

    n: int
    true: int
    worst: int
    taken: int
    base_true: int | None = None
    base_worst: int | None = None
    spared: int = 0
    paired: Paired | None = None
    complete: bool = True
    same: bool = False
    finders: Sequence[str] = ()
    doubts: Sequence[str] = ()
    idle: bool = False
    followed: bool = True
    undefined: Sequence[str] = ()
    relentless: bool = False
    distinct: int | None = None

    @property
    def counted(self) -> int:
        return self.n if self.distinct is None else self.distinct

    @property
    def seems(self) -> bool:
        return self.followed and (self.base_true is None or self.true > self.base_true)

    @property
    def enough(self) -> bool:
        """All of AutoAttack was run or, where it is not defined, all else."""
        return self.complete or bool(self.undefined and self.relentless)

    @property
    def forbidden(self) -> list[str]:
        """Why nothing can be said in the model's favour."""
        return [FORBID[name] for name in self.doubts if name in FORBID]

    @property
    def masked(self) -> bool:
        return beyond_chance(self.taken, self.spared, self.counted)

    @property
    def direction(self) -> int:
        return self.paired.direction if self.paired else 0


def weigh(
    right: Callable[..., Tensor],
    base_right: Callable[..., Tensor] | None,
    paired: Paired | None,
    complete: bool,
    same: bool,
    finders: Sequence[str] = (),
    doubts: Sequence[str] = (),
    again: tuple[Tensor | None, Tensor | None] = (None, None),
    distinct: Tensor | None = None,
) -> Evidence:
    """`right(kind)`: (n,) bool, right under rows of that kind and before; `right()`: under all.

    again: (n,) bool of the model and of the base, broken by further attacks along the true gradient; None: by none.
    distinct: (n,) bool, no copies of others; None: all.
    """
    true, worst = right("true gradient"), right()
    counted = torch.ones_like(true) if distinct is None else distinct
    lost = _lost(true & ~worst & counted, again[0])
    right_true, right_worst, taken = (int(part.sum()) for part in (true, worst, lost))
    alone = Evidence(
        len(true), right_true, right_worst, taken, complete=complete, finders=finders, doubts=doubts,
        distinct=int(counted.sum()),
    )  # fmt: skip
    if base_right is None:
        return alone
    base_true, base_worst = base_right("true gradient"), base_right()
    base_lost = _lost(base_true & ~base_worst & counted, again[1])
    return replace(
        alone,
        taken=int((lost & ~base_lost).sum()),
        base_true=int(base_true.sum()),
        base_worst=int(base_worst.sum()),
        spared=int((base_lost & ~lost).sum()),
        paired=paired,
        same=same,
    )


def _lost(broken: Tensor, again: Tensor | None) -> Tensor:
    return broken if again is None else broken & ~again


def _figures(e: Evidence) -> str:
    model = f"in the worst case the model is right on {e.worst} of {e.n} inputs"
    if e.paired is None:
        return model
    those = f" on the {e.counted} that are no copies of others" if e.counted < e.n else ""
    return (
        f"{model}, its base on {e.base_worst}: {100 * e.paired.difference:+.1f} points{those} (95 % interval "
        f"{100 * e.paired.low:+.1f} to {100 * e.paired.high:+.1f}, McNemar p = {e.paired.p:.2g})"
    )


def _idle(e: Evidence) -> str:
    missing = f" ({'; '.join(e.undefined)})" if e.undefined else ""
    return (
        f"no attack was run{missing}: unattacked the model is right on {e.worst} of {e.n} inputs, and no more is known"
    )


def _too_few(e: Evidence) -> str:
    beside = ", copies of them left out," if e.counted < e.n else ""
    return (
        f"{e.counted} inputs{beside} can show nothing: with fewer than {ENOUGH} every outcome could be chance; give "
        "hundreds"
    )


def _masking(e: Evidence) -> str:
    beside = "" if e.base_true is None else f" against {e.base_true}"
    then = {-1: "; it is a measurable loss", 0: "", 1: "; the remainder is not shown to be safe"}[e.direction]
    return (
        f"{_figures(e)}; the true gradient alone would show {e.true}{beside}: it hides adversarial examples, found by "
        f"{', '.join(e.finders)}{then}"
    )


def _no_base(e: Evidence) -> str:
    return f"{_figures(e)}; whether that is a gain takes the model that it was made from (base=...)"


def _base_doubted(e: Evidence) -> str:
    return (
        f"{_figures(e)}, but attacks on the base may have failed, so that its worst case is not known "
        "(docs/findings.md says what to do)"
    )


def _part(e: Evidence) -> str:
    if e.undefined:
        return f"{_figures(e)}, but {_undefined(e)}: claim it after attacks='relentless' (docs/evaluation.md says why)"
    return f"{_figures(e)}, but only a part of AutoAttack was run: claim it after attacks='standard'"


def _undefined(e: Evidence) -> str:
    return f"not all of AutoAttack can be run here ({'; '.join(e.undefined)})"


def _gain(e: Evidence) -> str:
    return _figures(e) if e.complete else f"{_figures(e)}; {_undefined(e)}, all else was"


def _doubtful(e: Evidence) -> str:
    others = ", ".join(name for name in e.doubts if name not in FORBID)
    why = [*e.forbidden, *([f"the attacks may have failed: {others}"] if others else [])]
    return f"{_figures(e)}, but {'; and '.join(why)} (docs/findings.md says what to do)"


def _wide(e: Evidence) -> str:
    needed = e.paired and e.paired.needed(MARGIN)
    enough = f"about {needed} would decide" if needed else "the difference is as large as what is to be ruled out"
    return f"{_figures(e)}; {e.counted} inputs leave a gain of more than {100 * MARGIN:.0f} points possible, {enough}"


def _nothing(e: Evidence) -> str:
    if e.same:
        return f"{_figures(e)}; the two give the same logits on every input"
    needed = e.paired and e.paired.needed()
    return _figures(e) + (f"; were it real, about {needed} inputs would show it" if needed else "")


RULES: tuple[tuple[str, Callable[[Evidence], bool], Callable[[Evidence], str]], ...] = (
    ("cannot say", lambda e: e.idle, _idle),
    ("cannot say", lambda e: e.counted < ENOUGH, _too_few),
    ("masking", lambda e: e.seems and e.masked and SMALL not in e.doubts, _masking),
    ("cannot say", lambda e: e.paired is None, _no_base),
    ("cannot say", lambda e: e.direction < 0 and BASE_DOUBTED in e.doubts, _base_doubted),
    ("loss", lambda e: e.direction < 0, _figures),
    ("cannot say", lambda e: bool(e.forbidden), _doubtful),
    ("cannot say", lambda e: e.direction > 0 and not e.enough, _part),
    ("cannot say", lambda e: e.direction > 0 and bool(e.doubts), _doubtful),
    ("gain", lambda e: e.direction > 0, _gain),
    ("cannot say", lambda e: e.paired.high > MARGIN, _wide),
    ("no measurable gain", lambda e: True, _nothing),
)
VERDICTS = tuple(dict.fromkeys(name for name, _, _ in RULES))

# What a process that judges a model exits with: 0 only where there is something to be glad of. 1 and 2 are left to
# Python's errors and to a command line that was not understood.
EXIT_CODES = {"gain": 0, "no measurable gain": 3, "loss": 4, "masking": 5, "cannot say": 6}


def judge(evidence: Evidence) -> tuple[str, str]:
    """(verdict, sentence)"""
    return next((name, words(evidence)) for name, holds, words in RULES if holds(evidence))
