"""Runs rows on what still stands, and believes no claim that it has not checked.

An attack's examples count only where they lie inside the ball and the box and the model, asked again, is wrong.
"""

import time

import torch
from torch import Tensor, nn

from forged_fx.evaluate import checks, fingerprint
from forged_fx.evaluate.attacks import Attack, Setting, toolbox
from forged_fx.evaluate.gradients import Context, Logits
from forged_fx.evaluate.report import Progress
from forged_fx.evaluate.result import STANDING, Row, Side

UNRELIABLE = 0.002  # share of n that Square may take after the others; auto-attack's check_square_sr


def predict(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    """Predicted classes, (n,) int64, on the CPU; x may be empty, and is moved to the model's device in batches."""
    device = checks.device_of(model, x.device)
    with torch.no_grad():
        parts = [model(batch.to(device)).max(1)[1].cpu() for batch in x.split(batch_size) if len(batch)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


class Subject:
    """One side under attack: the rows run so far, and what they left standing."""

    def __init__(self, name: str, model: nn.Module, x: Tensor, y: Tensor, batch_size: int, progress: Progress) -> None:
        self.name, self.model, self.x, self.y = name, model, x, y
        self.batch_size, self.progress = batch_size, progress
        self.device = checks.device_of(model, x.device)
        self.rows: list[Row] = []
        self.broken_by = torch.full((len(x),), STANDING)
        self.examples = x.clone()

    def standing(self) -> Tensor:
        return (self.broken_by == STANDING).nonzero().flatten()

    def _row(self, kind: str, attack: str, indices: Tensor) -> Row:
        row = Row(self.name, kind, attack, attacked=len(indices), standing=len(self.standing()))
        self.rows.append(row)
        return row

    def _take(self, row: Row, indices: Tensor, examples: Tensor) -> None:
        self.broken_by[indices] = len(self.rows) - 1
        self.examples[indices.to(self.x.device)] = examples.to(self.x.device)
        row.broken += len(indices)
        row.standing -= len(indices)

    def natural(self, classes: int | None = None) -> Tensor:
        """Row 0: what is wrong without any attack. Returns the logits, (n, classes), on the CPU."""
        every = torch.arange(len(self.x))
        row, began, parts = self._row("natural", "none", every), time.perf_counter(), []
        self.progress.begin(f"{self.name}: natural", len(every))
        with torch.no_grad():
            for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
                out = checks.logits(self.model(x.to(self.device)), x, y, self.name, classes)
                classes = out.shape[1]
                parts.append(out.cpu())
                self.progress.advance(len(x))
        logits = torch.cat(parts)
        wrong = (logits.max(1)[1] != self.y.cpu()).nonzero().flatten()
        self._take(row, wrong, self.x[wrong.to(self.x.device)])
        row.alone, row.seconds = row.standing / len(self.x), time.perf_counter() - began
        return logits

    def attack(self, attack: Attack, kind: str, setting: Setting, context: Context, skip: str = "") -> None:
        """Run one attack on what still stands, or record why not: because it cannot be run, or `skip`."""
        reason = attack.unfit(setting) or skip
        todo = self.standing() if not reason else torch.zeros(0, dtype=torch.int64)
        row, began = self._row(kind, attack.name, todo), time.perf_counter()
        row.note = f"left out: {reason}" if reason else ""
        self.progress.begin(f"{self.name}: {attack.name}, {kind}", len(todo))
        logits = Logits(self.model)
        tools = toolbox(logits, setting)
        for indices in todo.split(self.batch_size) if len(todo) else ():
            x = self.x[indices.to(self.x.device)].to(self.device)
            y = self.y[indices.to(self.y.device)].to(self.device)
            with context():
                examples = attack.run(tools, x.clone(), y.clone()).detach()
            fooled = logits(examples).max(1)[1] != y
            allowed = setting.threat.allows(x, examples)
            row.rejected += int((fooled & ~allowed).sum())
            broken = (fooled & allowed).cpu()
            self._take(row, indices[broken], examples[broken.to(examples.device)])
            self.progress.advance(len(indices))
        row.seconds = time.perf_counter() - began
        notes = [row.note] if row.note else []
        if row.rejected:
            notes.append(f"{row.rejected} examples outside the ball or the box do not count")
        gradients_tried = any(r.attacked for r in self.rows if r.kind == kind and r is not row)
        if not attack.gradient and gradients_tried and row.broken > UNRELIABLE * len(self.x):
            notes.append("found what the gradients had missed: they may be masked")
        row.note = "; ".join(notes)

    def replay(self, other: "Subject") -> None:
        """Transfer: the other side's adversarial examples, shown to this one.

        Shown for every input that is right unattacked, standing or not: it costs one forward pass and gives the
        accuracy under transfer alone.
        """
        found = (other.broken_by > 0) & (self.broken_by != 0)  # 0: wrong without attack, nothing to replay
        every = found.nonzero().flatten()
        todo = (found & (self.broken_by == STANDING)).nonzero().flatten()
        row, began = self._row("transfer", f"examples of the {other.name}", todo), time.perf_counter()
        self.progress.begin(f"{self.name}: transfer", len(every))
        examples = other.examples[every.to(self.x.device)]
        fooled = predict(self.model, examples, self.batch_size) != self.y[every.to(self.y.device)].cpu()
        broken = fooled & (self.broken_by[every] == STANDING)
        self._take(row, every[broken], examples[broken.to(examples.device)])
        row.alone = (int((self.broken_by != 0).sum()) - int(fooled.sum())) / len(self.x)
        row.seconds = time.perf_counter() - began
        self.progress.advance(len(every))

    def side(self) -> Side:
        """The outcome. All rows must have been run."""
        broken = (self.broken_by != STANDING).nonzero().flatten()
        return Side(
            self.name,
            type(self.model).__name__,
            fingerprint.of_model(self.model),
            self.rows,
            self.broken_by,
            self.examples[broken.to(self.x.device)].cpu(),
        )
