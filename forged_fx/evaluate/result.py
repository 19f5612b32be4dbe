"""What an evaluation found: rows, outcome by example, adversarial examples, and the figures that follow."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from forged_fx.evaluate import copies
from forged_fx.evaluate.attacks import follows
from forged_fx.evaluate.further import round_of
from forged_fx.evaluate.gallery import Gallery
from forged_fx.evaluate.statistics import Paired, compare
from forged_fx.evaluate.threat import Threat
from forged_fx.evaluate.verdict import EXIT_CODES, Evidence, judge, weigh

LEFT_OUT = "left out: "  # how a row's note begins that was not run
UNDER_BPDA = "gradients under BPDA"  # in `Side.slopes`
STANDING = -1  # in `Side.broken_by`: nothing broke this example

# The kinds of row, in the order in which they are run. A figure "under X" counts an example as broken if a row of
# kind X or of an earlier kind broke it, so that figures fall from left to right and the last is the worst case.
KINDS = ("natural", "true gradient", "BPDA", "transfer", "further")

# kind -> what a figure under it is called, where it is not the last: that is the worst case
FIGURES = {
    "natural": "no attack",
    "true gradient": "true gradient alone",
    "BPDA": "true gradient and BPDA",
    "transfer": "true gradient, BPDA and transfer",
}


def identity(description: str, fingerprint: str, forging: str | None) -> dict[str, str]:
    """By which a run knows its models: one that is not forged as an earlier version did, which did not ask."""
    return {"class": description, "fingerprint": fingerprint, **({"forging": forging} if forging else {})}


@dataclass
class Row:
    """One attack on one side.

    side: "model" or "base". kind: one of `KINDS`. attacked: inputs still standing on which it was run. broken: of
    these. standing: inputs left after it. rejected: examples that it offered and that fool the side but lie outside
    the ball or the box; they do not count. alone: accuracy under this row alone, where it was tried on every input.
    seconds: of computing, of all processes together. note: why it was left out, or what is remarkable.
    """

    side: str
    kind: str
    attack: str
    attacked: int = 0
    broken: int = 0
    standing: int = 0
    rejected: int = 0
    alone: float | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def left_out(self) -> str:
        """Why it was not run; "" if it was."""
        return self.note.removeprefix(LEFT_OUT) if self.note.startswith(LEFT_OUT) else ""

    @property
    def over_again(self) -> bool:
        """Whether it follows the true gradient, as the rows of that kind did before it."""
        return self.kind == KINDS[-1] and follows(self.attack)


@dataclass(eq=False)
class Side:
    """One of the two that are compared, named "model" or "base".

    fingerprint: see `fingerprint.of_model`. broken_by: (n,) int64, the index in `rows` of the row that broke the
    example, or -1. examples: (k, ...) float32, for each of the k broken inputs, in order, an input that the side
    gets wrong; for one that is wrong without attack, that input itself. forging: see `fingerprint.of_forging`; answers:
    see `answers.summary`; slopes: "gradients" and, where that differs, `UNDER_BPDA` -> `answers.slopes`. None and none
    in a result of an earlier version, which does not say.
    """

    name: str
    description: str
    fingerprint: str
    rows: list[Row]
    broken_by: Tensor
    examples: Tensor
    forging: str | None = None
    answers: list[float] | None = None
    slopes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, str]:
        return identity(self.description, self.fingerprint, self.forging)

    @property
    def listed(self) -> list[Row]:
        """The rows as a table shows them: those left out one after the other for one reason are one."""

        def same(row: Row) -> tuple[str, str] | int:
            return (row.kind, row.note) if row.left_out else id(row)

        groups = [list(group) for _, group in groupby(self.rows, same)]
        return [replace(first, attack=", ".join(row.attack for row in (first, *more))) for first, *more in groups]

    @property
    def broken(self) -> Tensor:
        """Indices of the broken inputs, (k,) int64, ascending."""
        return (self.broken_by != STANDING).nonzero().flatten()

    def broken_in(self, rows: Callable[[Row], bool]) -> Tensor:
        """(n,) bool: broken by one of these rows."""
        chosen = [i for i, row in enumerate(self.rows) if rows(row)]
        return torch.isin(self.broken_by, torch.tensor(chosen, dtype=torch.int64))

    def right(self, under: str = KINDS[-1]) -> Tensor:
        """(n,) bool: classified rightly under rows of kind `under` and of the kinds before it."""
        return ~self.broken_in(lambda row: KINDS.index(row.kind) <= KINDS.index(under))

    def accuracy(self, under: str = KINDS[-1]) -> float:
        return float(self.right(under).double().mean())

    @property
    def undefined(self) -> list[str]:
        """Which of AutoAttack's attacks could not be run, and why."""
        return [f"{row.attack}: {row.left_out}" for row in self.rows if row.kind == KINDS[1] and row.left_out]

    @property
    def over_again(self) -> Tensor:
        """(n,) bool: broken by further attacks along the true gradient."""
        return self.broken_in(lambda row: row.over_again)


def evidence(
    model: Side,
    base: Side | None,
    *,
    complete: bool,
    same: bool,
    doubts: Sequence[str] = (),
    distinct: Tensor | None = None,
) -> Evidence:
    """What `verdict.judge` judges by. complete, same, doubts, distinct: as in `Result`."""
    paired = compare(model.right(), base.right(), same=same, distinct=distinct) if base else None
    ran = [row for row in model.rows[1:] if row.attacked]
    after = [row for row in ran if row.kind != KINDS[1] and row.broken and not row.over_again]
    names = [row.attack for row in model.rows]
    weighed = weigh(
        model.right,
        base.right if base else None,
        paired,
        complete=complete and not model.undefined,
        same=same,
        finders=[f"{row.attack}{' under BPDA' * (row.kind == 'BPDA')} ({row.broken})" for row in after],
        doubts=doubts,
        again=(model.over_again, base.over_again if base else None),
        distinct=distinct,
    )
    return replace(
        weighed,
        idle=not ran and model.rows[0].standing > 0,
        followed=any(row.kind == KINDS[1] and follows(row.attack) for row in ran),
        undefined=model.undefined,
        relentless="noise" in names and any(map(round_of, names)),
    )


def judged(model: Side, base: Side | None, **known: Any) -> tuple[str, str]:
    """(verdict, sentence), by the rules of `verdict.py`. known: the rest of what `evidence` takes."""
    return judge(evidence(model, base, **known))


@dataclass(frozen=True)
class Finding:
    """One check of the model. value: None if it could not be made, and `note` says why; raised: value > bound.

    unit: what the value is a number of. masking: raised, it forbids the verdict "gain".
    """

    name: str
    value: float | None
    bound: float
    unit: str
    raised: bool
    masking: bool
    note: str = ""


def doubts(findings: Iterable[Finding]) -> list[str]:
    """Names of those that are raised and forbid a gain."""
    return [finding.name for finding in findings if finding.raised and finding.masking]


@dataclass(eq=False, repr=False)
class Result:
    """What `evaluate` found. Accuracies are shares of `n` in [0, 1]. `print` shows a table.

    attacks: names; plan: which of them are shown what, see `attacks.Plan`; complete: all four of AutoAttack's standard
    attacks were run. same: model and base gave the same logits, bit for bit, wherever they were asked. block: see
    `blocks.py`. bpda: name of the context. data: shape and SHA-256 of x and y. command: the program and its arguments.
    machine: device, threads, processes. findings: every check of the model, raised or not; probe_seconds: what those
    took that ask the model. gallery: a few broken inputs as they were, for a page to show. copies: inputs that are
    copies of one before them, which count in no test and no interval.
    """

    n: int
    threat: Threat
    attacks: list[str]
    plan: dict[str, list[str]]
    complete: bool
    seed: int
    batch_size: int
    block: int
    bpda: str
    model: Side
    base: Side | None
    same: bool
    data: dict[str, Any]
    versions: dict[str, str]
    command: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    probe_seconds: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)
    gallery: Gallery | None = None
    copies: list[int] = field(default_factory=list)

    @property
    def distinct(self) -> Tensor:
        """(n,) bool: no copies."""
        return copies.others(self.n, self.copies)

    @property
    def sides(self) -> list[Side]:
        return [self.model, *([self.base] if self.base else [])]

    @property
    def rows(self) -> list[Row]:
        """The model's rows, then the base's, each in the order of running."""
        return [row for side in self.sides for row in side.rows]

    @property
    def kinds(self) -> list[str]:
        """The kinds that have rows, in the order of `KINDS`; the last one's figure is the worst case."""
        return [kind for kind in KINDS if any(row.kind == kind for row in self.rows)]

    @property
    def figures(self) -> dict[str, str]:
        """What a figure is called -> the last kind of row that it counts; the least flattering first."""
        *kinds, last = self.kinds
        return {"worst case": last} | {FIGURES[kind]: kind for kind in reversed(kinds)}

    @property
    def worst_case(self) -> float:
        """Share of inputs that the model classifies rightly whatever row attacked them: the headline."""
        return self.model.accuracy()

    @property
    def base_worst_case(self) -> float | None:
        return self.base.accuracy() if self.base else None

    def compared(self, under: str = KINDS[-1]) -> Paired | None:
        """Model and base under rows of kind `under` and of the kinds before it, on `distinct` inputs; None without a
        base."""
        if self.base is None:
            return None
        return compare(self.model.right(under), self.base.right(under), same=self.same, distinct=self.distinct)

    @cached_property
    def _evidence(self) -> Evidence:
        known = {"complete": self.complete, "same": self.same, "doubts": self.doubts, "distinct": self.distinct}
        return evidence(self.model, self.base, **known)

    @property
    def enough(self) -> bool:
        """Whether all of AutoAttack was run or, where that is not defined, all else: what a gain takes."""
        return self._evidence.enough

    @property
    def doubts(self) -> list[str]:
        """Names of the findings that are raised and forbid a gain."""
        return doubts(self.findings)

    @property
    def verdict(self) -> str:
        """One of "gain", "no measurable gain", "loss", "masking", "cannot say"; `verdict.py` has the rules."""
        return judge(self._evidence)[0]

    @property
    def sentence(self) -> str:
        """The verdict in one plain sentence."""
        return judge(self._evidence)[1]

    @property
    def exit_code(self) -> int:
        """For scripts: `verdict.EXIT_CODES`. 0 for a gain only."""
        return EXIT_CODES[self.verdict]

    def verify(self, model: nn.Module, x: Tensor, y: Tensor, base: nn.Module | None = None) -> int:
        """Check every example again, against the model (and the base); see `record.verify`."""
        from forged_fx.evaluate.record import verify

        return verify(self, model, x, y, base)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write result.json, examples.safetensors and timing.json; each appears whole or not at all.

        FileExistsError if the folder holds a result or an unfinished run already, unless `overwrite`.
        """
        from forged_fx.evaluate.record import save

        save(self, folder, overwrite)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Result":
        """Read what `save` wrote. ValueError if it is of another format version, incomplete or inconsistent.

        That its examples do break the model is checked with the model: `verify`.
        """
        from forged_fx.evaluate.record import load

        return load(folder)

    def __str__(self) -> str:
        from forged_fx.evaluate.terminal import text

        return text(self)

    def __rich__(self) -> Any:
        from forged_fx.evaluate.terminal import render

        return render(self)

    def __repr__(self) -> str:
        return f"<Result: {self.verdict}; worst case {self.worst_case:.2%} of {self.n}>"
