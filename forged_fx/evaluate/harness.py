"""Runs rows on what still stands, and believes no claim that it has not checked.

An attack's examples count only where they lie inside the ball and the box and the model, asked again, is wrong.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from forged_fx.checked import in_a_line
from forged_fx.evaluate import answers, checks, fingerprint
from forged_fx.evaluate.attacks import Attack, Setting, follows, toolbox
from forged_fx.evaluate.blocks import Blocks, Fields, Outcome, same_logits
from forged_fx.evaluate.compiled import Eager, agree, is_compiled
from forged_fx.evaluate.gallery import Gallery
from forged_fx.evaluate.gradients import Borrowed, Context, Logits, differ, predicted
from forged_fx.evaluate.result import LEFT_OUT, STANDING, UNDER_BPDA, Row, Side, identity
from forged_fx.evaluate.terminal import Progress
from forged_fx.evaluate.threat import Threat
from forged_fx.models import device_of, with_own_state
from forged_fx.randomness import kept_randomness

FOUND: Fields = {"broken": (torch.int64, 1), "examples": (torch.float32, None), "rejected": (torch.int64, 0)}
UNRELIABLE = 0.002  # share of n that Square may take after the others; auto-attack's check_square_sr


def predict(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """What is `predicted`, on the CPU; x may be empty, and is copied to the model's device in batches."""
    device = device_of(model, x.device)
    with torch.no_grad():
        parts = [predicted(model(batch.clone().to(device))).cpu() for batch in x.split(batch_size) if len(batch)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _note(reason: str, rejected: int, missed: bool = False) -> str:
    notes = {
        f"{LEFT_OUT}{reason}": reason,
        f"{rejected} examples outside the ball or the box do not count": rejected,
        "found what the gradients had missed: they may be masked": missed,
    }
    return "; ".join(note for note, holds in notes.items() if holds)


class Subject:
    """One side under attack: the rows run so far, and what they left standing."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        batch_size: int,
        blocks: Blocks,
        progress: Progress,
    ) -> None:
        self.name, self.model, self.x, self.y, self.threat = name, model, x, y, threat
        self.batch_size, self.blocks, self.progress = batch_size, blocks, progress
        # What attacks are run on. No gradient but the true one reaches into the threads of DataParallel; and of a
        # compiled model, see `natural`.
        self.attacked = model.module if isinstance(model, nn.DataParallel) else model
        threads = f"the {name} is a DataParallel; attacked without its threads, and what breaks it breaks it with them"
        self.notes = [threads] if self.attacked is not model else []
        self.changes: dict[str, bool] = {}  # what `sees_through` found
        self.slopes: dict[str, Tensor] = {}
        self.missing: dict[str, float] = {}  # what `reach.py` found
        self.device = device_of(model, x.device)
        self.fresh: nn.Module | str  # as it was before it was asked anything; or why there is no such copy
        try:
            self.fresh = with_own_state(model)
        except Exception as error:
            self.fresh = f"there is no copy of it from before it was asked ({in_a_line(error)})"
        self.description, self.fingerprint = type(model).__name__, fingerprint.of_model(model)
        self.forging = fingerprint.of_forging(model)
        self.rows: list[Row] = []
        self.broken_by = torch.full((len(x),), STANDING)
        self.examples = torch.zeros_like(x)  # of the broken inputs

    @property
    def identity(self) -> dict[str, str]:
        return identity(self.description, self.fingerprint, self.forging)

    def setting(self, classes: int) -> Setting:
        """What attacks on this side have to know."""
        shape = tuple(self.x.shape[1:])
        return Setting(self.threat, classes, shape, self.blocks.seed, self.device)

    def standing(self) -> Tensor:
        return (self.broken_by == STANDING).nonzero().flatten()

    def inputs(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """x and y of these inputs, on the model's device."""
        return self.x[indices].to(self.device), self.y[indices].to(self.device)

    def _begin(self, kind: str, attack: str, attacked: int) -> Row:
        row = Row(self.name, kind, attack, attacked=attacked, standing=len(self.standing()))
        self.rows.append(row)
        return row

    def _run(
        self, row: Row, indices: Tensor, work: Callable[[Tensor], Outcome], fields: Fields | None, passes: int = 0
    ) -> Iterator[tuple[Tensor, Outcome]]:
        """`work` on every block of `indices`; see `Blocks.run`. passes: see `Attack.passes`."""
        self.progress.begin(f"{self.name}: {row.attack}, {row.kind}", len(indices), passes)
        name = f"{self.name} {len(self.rows) - 1} {row.kind} {row.attack}"
        for block, outcome in self.blocks.run(name, indices, work, fields):
            row.seconds += float(outcome["seconds"])
            yield block, outcome
            self.progress.advance(len(block))

    def _take(self, row: Row, indices: Tensor, examples: Tensor) -> None:
        # asked again, because an outcome may come from the file of an unfinished run
        known = torch.isin(indices, self.standing()).all() and len(indices.unique()) == len(indices)
        if not known or examples.shape != (len(indices), *self.x.shape[1:]):
            raise ValueError(f"{row.attack} on the {self.name}: breaks other inputs than those that stand")
        if not bool(self.threat.allows(self.x[indices].cpu(), examples.cpu()).all()):
            raise ValueError(f"{row.attack} on the {self.name}: examples outside the ball or the box")
        self.broken_by[indices] = len(self.rows) - 1
        self.examples[indices] = examples.to(self.x.device)
        row.broken += len(indices)
        row.standing -= len(indices)

    def natural(self, classes: int | None = None) -> Tensor:
        """Row 0: what is wrong without any attack. Returns the logits, (n, classes), on the CPU."""
        every = torch.arange(len(self.x))
        row = self._begin("natural", "none", len(every))

        eager = Eager(self.attacked) if is_compiled(self.attacked) else None

        def answer(indices: Tensor) -> Outcome:
            logits, eagerly, width = [], [], classes
            with torch.no_grad():
                for x, y in zip(*(part.split(self.batch_size) for part in self.inputs(indices)), strict=True):
                    logits.append(checks.logits(checks.ask(self.model, x, self.name), x, y, self.name, width))
                    width = logits[0].shape[1]
                    eagerly += [eager(x)] if eager else []
            outcome = {"logits": torch.cat(logits).cpu()}
            return outcome | ({"eagerly": torch.cat(eagerly).cpu()} if eager else {})

        found = [outcome for _, outcome in self._run(row, every, answer, None)]
        logits = torch.cat([outcome["logits"] for outcome in found])
        if eager and agree(logits, torch.cat([outcome["eagerly"] for outcome in found])):
            self.attacked = eager
            self.notes.append(
                f"the {self.name} is compiled; attacked eagerly, and what breaks it breaks it compiled too"
            )
        elif eager:
            self.notes.append(f"the {self.name} is compiled, and another function eagerly; attacked as it is, compiled")
        same = self.blocks.unchanged(f"{self.name} logits", logits, same_logits)
        checks.same_code(same, self.name, "the unfinished run began")
        self.logits = logits
        self._keep_slopes("gradients", nullcontext)
        wrong = (predicted(logits) != self.y.cpu()).nonzero().flatten()
        self._take(row, wrong, self.x[wrong])
        row.alone = row.standing / len(self.x)
        self.progress.end(row)
        return logits

    def sees_through(self, bpda: Context, name: str = "BPDA") -> bool:
        """Does BPDA change any gradient? See `gradients.differ`."""

        def compare(indices: Tensor) -> Outcome:
            x, _ = self.inputs(indices)
            return {"differ": torch.tensor(differ(self.attacked, x, self.threat, bpda, self.batch_size))}

        every = torch.arange(len(self.x))
        asked = self.blocks.run(f"{self.name} gradients {name}", every, compare, {"differ": (torch.bool, 0)})
        self.changes[name] = any(bool(outcome["differ"]) for _, outcome in asked)
        if name == "BPDA" and self.changes[name]:
            self._keep_slopes(UNDER_BPDA, bpda)
        return self.changes[name]

    def _keep_slopes(self, what: str, context: Context) -> None:
        """See `answers.slopes`; an error where they are not what they were when an unfinished run began."""

        def ask(indices: Tensor) -> Outcome:
            return {"slopes": answers.slopes(self.model, self.x[indices], self.batch_size, context)}

        few = torch.arange(min(answers.FEW, len(self.x)))
        found = [outcome["slopes"] for _, outcome in self.blocks.run(f"{self.name} {what}", few, ask, None)]
        self.slopes[what] = torch.cat(found)
        same = self.blocks.unchanged(f"{self.name} {what}", self.slopes[what], answers.same_slopes)
        checks.same_code(same, self.name, "the unfinished run began", what)

    def attack(
        self,
        attack: Attack,
        kind: str,
        setting: Setting,
        context: Context,
        *,
        skip: str = "",
        other: "Subject | None" = None,
    ) -> Row:
        """Run one attack on what still stands, or record why not: because it cannot be run, or `skip`.

        other: the side whose adversarial examples are an attack's starting points, or whose gradient it borrows.
        """
        alone = "there is no other side" if (attack.starts or attack.borrows) and other is None else ""
        reason = attack.unfit(setting) or skip or alone
        todo = self.standing() if not reason else torch.zeros(0, dtype=torch.int64)
        if attack.starts and other is not None:
            todo = todo[other.broken_by[todo] > 0]  # 0: wrong without attack
        row = self._begin(kind, attack.name, len(todo))
        attacked = Borrowed(self.attacked, other.attacked) if attack.borrows and other else self.attacked
        tools = toolbox(Logits(attacked, self.batch_size, context, self.progress.fed, finite=True), setting)
        attack.prepare(tools)

        def search(indices: Tensor) -> Outcome:
            x, y = self.inputs(indices)
            starts = [other.examples[indices].to(x.device)] if attack.starts and other else []
            return self.judge(setting, indices, attack.run(tools, x.clone(), y.clone(), *starts).detach())

        for _, found in self._run(row, todo, search, FOUND, attack.passes(tools)):
            self._take(row, found["broken"], found["examples"])
            row.rejected += int(found["rejected"])
        gradients_tried = any(r.attacked and follows(r.attack) for r in self.rows if r.kind == kind)
        missed = not attack.gradient and gradients_tried and row.broken > UNRELIABLE * len(self.x)
        row.note = _note(reason, row.rejected, missed)
        self.progress.end(row)
        return row

    def share(self, attack: Attack, setting: Setting, context: Context, sides: "Sequence[Subject]") -> None:
        """Run one attack on this side for what still stands on any, and show its examples to each."""
        name, reason = f"{attack.name} on the {self.name}", attack.unfit(setting)
        rows = [side._begin("transfer", name, 0 if reason else len(side.standing())) for side in sides]
        stands = torch.stack([side.broken_by == STANDING for side in sides]).any(0)
        tools = toolbox(Logits(self.attacked, self.batch_size, context, finite=True), setting)

        def search(indices: Tensor) -> Outcome:
            x, y = self.inputs(indices)
            examples = attack.run(tools, x.clone(), y.clone()).detach()
            outcome: Outcome = {}
            for side in sides:
                mine = side.broken_by[indices] == STANDING
                found = side.judge(setting, indices[mine], examples[mine].to(side.device))
                outcome |= {f"{side.name} {key}": value for key, value in found.items()}
            return outcome

        todo = stands.nonzero().flatten() if not reason else torch.zeros(0, dtype=torch.int64)
        fields = {f"{side.name} {key}": field for side in sides for key, field in FOUND.items()}
        for _, found in self._run(rows[sides.index(self)], todo, search, fields):
            for side, row in zip(sides, rows, strict=True):
                side._take(row, found[f"{side.name} broken"], found[f"{side.name} examples"])
                row.rejected += int(found[f"{side.name} rejected"])
        for row in rows:
            row.note = _note(reason, row.rejected)
            self.progress.end(row)

    def judge(self, setting: Setting, indices: Tensor, examples: Tensor) -> Outcome:
        """Which of the examples that an attack claims for these inputs count.

        broken: indices, (k,) int64; examples: (k, ...), theirs; rejected: how many others fool the model from outside
        the ball or the box.
        """
        x, y = self.inputs(indices)
        fooled = (predict(self.model, examples, self.batch_size) != y.cpu()).to(x.device)
        allowed = setting.threat.allows(x, examples)
        broken = fooled & allowed
        return {
            "broken": indices[broken.cpu()],
            "examples": examples[broken].cpu(),
            "rejected": (fooled & ~allowed).sum().cpu(),
        }

    def replay(self, other: "Subject", kind: str = "transfer") -> None:
        """Transfer: the other side's adversarial examples, shown to this one.

        Shown for every input that is right unattacked, standing or not: it costs one forward pass and gives the
        accuracy under transfer alone.
        """
        found = (other.broken_by > 0) & (self.broken_by != 0)  # 0: wrong without attack, nothing to replay
        stands = self.broken_by == STANDING
        row = self._begin(kind, f"examples of the {other.name}", int((found & stands).sum()))

        def show(indices: Tensor) -> Outcome:
            examples = other.examples[indices]
            return {"fooled": predict(self.model, examples, self.batch_size) != self.inputs(indices)[1].cpu()}

        fooled = 0
        for block, outcome in self._run(row, found.nonzero().flatten(), show, {"fooled": (torch.bool, 1)}):
            if len(outcome["fooled"]) != len(block):
                raise ValueError(f"{row.attack}: {len(outcome['fooled'])} outcomes of {len(block)} inputs")
            fooled += int(outcome["fooled"].sum())
            broken = block[outcome["fooled"] & stands[block]]
            self._take(row, broken, other.examples[broken])
        row.alone = (int((self.broken_by != 0).sum()) - fooled) / len(self.x)
        self.progress.end(row)

    def show(self, indices: Tensor) -> Gallery:
        """These broken inputs, as they were and as what they are now taken for."""
        predicted = predict(self.model, self.examples[indices], self.batch_size)
        return Gallery(indices, self.x[indices].cpu(), self.y[indices].cpu(), predicted)

    def side(self) -> Side:
        """The outcome. All rows must have been run."""
        broken = (self.broken_by != STANDING).nonzero().flatten()
        examples = self.examples[broken].cpu()
        with kept_randomness():
            asked = torch.cat([examples, answers.moved(self.x, self.threat).cpu()])
            logits = checks.answers(self.model, asked, self.batch_size, self.name)
        return Side(
            self.name,
            self.description,
            self.fingerprint,
            self.rows,
            self.broken_by,
            examples,
            self.forging,
            answers.summary(torch.cat([logits, self.logits])),
            self.slopes,
        )
