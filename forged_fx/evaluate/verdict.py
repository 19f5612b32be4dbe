"""From figures to one word, and one plain sentence.

The verdicts, and the rule for each; the first rule that holds decides:

| verdict | when |
|---|---|
| cannot say | fewer than 6 inputs: whatever the outcome, it could be chance |
| masking | the true gradient shows a gain, and BPDA or transfer take a measurable part of what it left standing |
| cannot say | no base to compare with |
| loss | in the worst case the model is measurably below its base |
| cannot say | a measurable gain, but not all of AutoAttack's attacks were run |
| gain | in the worst case the model is measurably above its base |
| no measurable gain | everything else |

*Measurably*: exact McNemar p <= 0.05, and 0 outside Tango's 95 % interval (`statistics.py`).

*Shows a gain*: more examples stand under the true gradient than do for the base; by one is enough, because that is
the figure that would be printed. Without a base the true gradient's figure is itself the claim.

*Take a measurable part*: BPDA and transfer are a second round of attacks, and a second round breaks an example or
two by its new random starts alone (on five plain networks, where it repeats the first: 0 to 3 of 300 to 500). So the
examples that it takes from the model alone are set against those that it takes from the base alone, in a one-sided
sign test at 5 % (5 against 0, 7 against 1), and must exceed 0.2 % of n, the bound at which auto-attack itself warns
that an attack found what the others should have found. Below that the verdict rests on the worst case: a gain of one
example that vanishes is no measurable gain, and no accusation.

Masking forbids a gain even where the worst case is measurably above the base: a model whose gradient is known to
hide adversarial examples has been shown to stand against these attacks only.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from forged_fx.evaluate.statistics import Paired, sign_tail

ENOUGH = 6  # 6 against 0 is the least that the exact test calls beyond chance
NEGLIGIBLE = 0.002  # auto-attack's check_square_sr


@dataclass(frozen=True)
class Evidence:
    """Counts of n examples. `true` and `worst`: right under the true gradient's rows, and under all rows.

    taken: examples that the rows after the true gradient's took from the model but not from the base; spared: from
    the base but not from the model.
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

    @property
    def seems(self) -> bool:
        return self.base_true is None or self.true > self.base_true

    @property
    def masked(self) -> bool:
        return self.taken - self.spared > NEGLIGIBLE * self.n and sign_tail(self.taken, self.spared) <= 0.05

    @property
    def direction(self) -> int:
        return self.paired.direction if self.paired else 0


def weigh(
    right: Callable[[str], Tensor],
    base_right: Callable[[str], Tensor] | None,
    paired: Paired | None,
    complete: bool,
    same: bool,
) -> Evidence:
    """`right(kind)`: (n,) bool, right under rows of that kind and before."""
    true, worst = right("true gradient"), right("further")
    lost = true & ~worst
    if base_right is None:
        return Evidence(len(true), int(true.sum()), int(worst.sum()), int(lost.sum()), complete=complete)
    base_true, base_worst = base_right("true gradient"), base_right("further")
    base_lost = base_true & ~base_worst
    return Evidence(
        n=len(true),
        true=int(true.sum()),
        worst=int(worst.sum()),
        taken=int((lost & ~base_lost).sum()),
        base_true=int(base_true.sum()),
        base_worst=int(base_worst.sum()),
        spared=int((base_lost & ~lost).sum()),
        paired=paired,
        complete=complete,
        same=same,
    )


def _figures(e: Evidence) -> str:
    model = f"in the worst case the model is right on {e.worst} of {e.n} inputs"
    if e.paired is None:
        return model
    return (
        f"{model}, its base on {e.base_worst}: {100 * e.paired.difference:+.1f} points (95 % interval "
        f"{100 * e.paired.low:+.1f} to {100 * e.paired.high:+.1f}, McNemar p = {e.paired.p:.2g})"
    )


def _too_few(e: Evidence) -> str:
    return f"{e.n} inputs can show nothing: with fewer than {ENOUGH} every outcome could be chance; give hundreds"


def _masking(e: Evidence) -> str:
    beside = "" if e.base_true is None else f" against {e.base_true}"
    then = {-1: "; it is a measurable loss", 0: "", 1: "; the remainder is not shown to be safe"}[e.direction]
    return (
        f"{_figures(e)}; the true gradient alone would show {e.true}{beside}: it hides adversarial examples that "
        f"BPDA or transfer find{then}"
    )


def _no_base(e: Evidence) -> str:
    return f"{_figures(e)}; whether that is a gain takes the model that it was made from (base=...)"


def _part(e: Evidence) -> str:
    return f"{_figures(e)}, but only a part of AutoAttack was run: claim it after attacks='standard'"


def _nothing(e: Evidence) -> str:
    if e.same:
        return f"{_figures(e)}; the two give the same logits on every input"
    needed = e.paired and e.paired.needed()
    return _figures(e) + (f"; were it real, about {needed} inputs would show it" if needed and needed > e.n else "")


RULES: tuple[tuple[str, Callable[[Evidence], bool], Callable[[Evidence], str]], ...] = (
    ("cannot say", lambda e: e.n < ENOUGH, _too_few),
    ("masking", lambda e: e.seems and e.masked, _masking),
    ("cannot say", lambda e: e.paired is None, _no_base),
    ("loss", lambda e: e.direction < 0, _figures),
    ("cannot say", lambda e: e.direction > 0 and not e.complete, _part),
    ("gain", lambda e: e.direction > 0, _figures),
    ("no measurable gain", lambda e: True, _nothing),
)
VERDICTS = tuple(dict.fromkeys(name for name, _, _ in RULES))


def judge(evidence: Evidence) -> tuple[str, str]:
    """(verdict, sentence)"""
    return next((name, words(evidence)) for name, holds, words in RULES if holds(evidence))
