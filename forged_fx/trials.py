"""Trying configurations out: a short attack on the inputs on which the base's outcome is closest to turning.

It ranks, and proves nothing: what `evaluate` finds is what counts.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from forged_fx import checked
from forged_fx.bpda import straight_through
from forged_fx.configuration import Configuration
from forged_fx.evaluate import checks, fingerprint, further, gradients, surrogate
from forged_fx.evaluate.attacks import Setting, toolbox
from forged_fx.evaluate.blocks import Blocks, Fields, Job, Outcome, same_logits
from forged_fx.evaluate.gradients import Context, Logits
from forged_fx.evaluate.terminal import Progress
from forged_fx.evaluate.threat import Threat
from forged_fx.models import device_of
from forged_fx.randomness import seed
from forged_fx.stats import Stats

NEAR = 100  # inputs nearest to the boundary
STEPS = 20  # of APGD, along each gradient
SMOOTH = min(surrogate.TEMPERATURES)  # the surrogate nearest to the forged function itself

MARGINS: Fields = {"margins": (torch.float64, 1)}
RIGHT: Fields = {"right": (torch.bool, 1)}
BEGUN: Fields = MARGINS | RIGHT | {"examples": (torch.float32, None)}


def loses_too_much(lost: int, n: int, most: float) -> bool:
    """Whether more than the share `most` of n is lost. (Of 100, 29 are 0.29, which times 100 is less than 29.)"""
    return lost / n > most


class Spent(Exception):
    """What was allowed is; the message says of what."""


@dataclass(frozen=True)
class Trial:
    """A configuration under the short attack.

    standing: of the inputs near the boundary, how many it still gets right. margin: the mean lead of the right class
    there, in units of the base's, each cut to [-1, 1]. natural: of all inputs, how many it gets right unattacked. fit:
    it loses no more of these than it may; one that is not fit is not attacked, and its standing and margin are None.
    seconds: of computing.
    """

    configuration: Configuration
    standing: int | None
    margin: float | None
    natural: int
    fit: bool
    seconds: float

    @classmethod
    def of(cls, record: Any) -> "Trial":
        """From JSON; ValueError for anything else. A record of an earlier version has figures of what was not attacked,
        which nobody measured."""
        trial = checked.build(cls, record, "a trial")
        if trial.fit and None in (trial.standing, trial.margin):
            raise ValueError("a trial that is fit was attacked, and its standing and margin are numbers")
        return trial if trial.fit else replace(trial, standing=None, margin=None)

    @property
    def score(self) -> tuple[bool, float, float, int]:
        """Larger is better; of two that do as well, the one with fewer sites."""
        standing, margin = (-math.inf if value is None else value for value in (self.standing, self.margin))
        return self.fit, standing, margin, -len(self.configuration.places)


class Trials:
    """made: the trials of everything but the base, in order; base: its own.

    near: indices of the inputs nearest to the boundary, (k,) int64: those that are right unattacked and whose class
    leads or lags least where the short attack on the base ends. budget: how many configurations; seconds: of computing,
    those of an earlier attempt included. To be used within `checks.at_peace`, of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        stats: Stats,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        max_natural_loss: float,
        budget: int,
        seconds: float | None,
        blocks: Blocks,
        batch_size: int,
        progress: Progress,
    ) -> None:
        self.model, self.stats, self.x, self.y, self.threat = model, stats, x, y, threat
        self.max_natural_loss = max_natural_loss
        self.budget, self.seconds = budget, math.inf if seconds is None else seconds
        self.blocks, self.batch_size, self.progress = blocks, batch_size, progress
        self.device = device_of(model, x.device)
        self.example: tuple[tuple, dict] = ((x[:8].to(self.device),), {})
        self.classes = checks.logits(checks.ask(model, self.example[0][0], "model"), x[:8], y, "model").shape[1]
        self.made: dict[Configuration, Trial] = {}
        self.spent = 0.0
        self._find_near()
        progress.begin("trying configurations", budget)

    def _find_near(self) -> None:
        seed(self.blocks.seed)  # a model may draw
        logits = checks.answers(self.model, self.x, self.batch_size, "model")
        same = self.blocks.unchanged("base logits", logits, same_logits)
        checks.same_code(same, "model", "the unfinished run began")

        def attack(indices: Tensor) -> Outcome:
            x, y = self._inputs(indices)
            margins, worst = self._attack(self.model, x, y, [nullcontext])
            return {"margins": margins, "examples": worst.cpu(), "right": _lead(self.model(x), y) > 0}

        ((found, seconds),) = self._all([Job("base", torch.arange(len(self.x)), attack, BEGUN)])
        margins, right, self.examples = found["margins"], found["right"], found["examples"]
        nearest = margins.abs().masked_fill(~right, math.inf).argsort(stable=True)
        self.near = nearest[: min(NEAR, int(right.sum()))].sort().values
        if not len(self.near):
            raise ValueError("the model is wrong on every input of the search: there is nothing to make robust")
        self.scale = max(float(margins[self.near].abs().mean()), 1e-12)
        self.base = self._trial(Configuration(), margins[self.near], int(right.sum()), seconds)

    def try_out(self, configurations: Iterable[Configuration]) -> Iterator[Trial]:
        """Their trials, in order: made before, or now, as many at once as there are processes.

        Raises Spent where a new one would go beyond the budget.
        """
        wanted = list(configurations)
        for configuration in wanted:
            if configuration.places and configuration not in self.made:
                new = [one for one in dict.fromkeys(wanted) if one.places and one not in self.made]
                team = new[: min(self.blocks.processes.size, self.budget - len(self.made))]
                if self.spent >= self.seconds:
                    raise Spent("the time is spent")
                if not team:
                    raise Spent("the budget is spent")
                self._make(team)
            yield self.made[configuration] if configuration.places else self.base

    def _make(self, team: Sequence[Configuration]) -> None:
        @functools.cache  # only where something is left to do
        def forged(configuration: Configuration) -> nn.Module:
            return configuration.forge(self.model, self.stats, self.example)

        def ask(configuration: Configuration, indices: Tensor) -> Outcome:
            x, y = self._inputs(indices)
            logits = torch.cat([forged(configuration)(part) for part in x.split(self.batch_size)])
            return {"right": _lead(logits, y) > 0}

        def attack(configuration: Configuration, indices: Tensor) -> Outcome:
            (x, y), module = self._inputs(indices), forged(configuration)
            shown = _lead(module(self.examples[indices].to(self.device)), y)  # the base's: transfer
            along: list[Context] = [nullcontext, straight_through, partial(surrogate.smooth, SMOOTH)]
            margins, _ = self._attack(module, x, y, along)
            return {"margins": margins.minimum(shown)}

        def all_of(
            few: Sequence[Configuration], what: str, indices: Tensor, work: Callable[..., Outcome], fields: Fields
        ) -> dict[Configuration, tuple[Outcome, float]]:
            names = [fingerprint.of_tensors([("configuration", one.record())])[:16] for one in few]
            pairs = zip(few, names, strict=True)
            jobs = [Job(f"{name} {what}", indices, partial(work, one), fields) for one, name in pairs]
            return dict(zip(few, self._all(jobs), strict=True))

        asked = all_of(team, "natural", torch.arange(len(self.x)), ask, RIGHT)
        natural = {one: int(outcome["right"].sum()) for one, (outcome, _) in asked.items()}
        before, n = self.base.natural, len(self.x)
        fit = [one for one in team if not loses_too_much(before - natural[one], n, self.max_natural_loss)]
        attacked = all_of(fit, "attacked", self.near, attack, MARGINS)
        for one in team:
            seconds = asked[one][1]
            if one in attacked:
                outcome, more = attacked[one]
                trial = self._trial(one, outcome["margins"], natural[one], seconds + more)
                said = f"{trial.standing} stand, margin {trial.margin:+.3f}, natural {trial.natural}"
            else:
                trial = Trial(one, None, None, natural[one], fit=False, seconds=seconds)
                said = f"natural {trial.natural}, too few: not attacked"
            self.made[one] = trial
            self.progress.advance(1)
            self.progress.log(f"{one}: {said}")

    def _trial(self, configuration: Configuration, margins: Tensor, natural: int, seconds: float) -> Trial:
        standing, margin = int((margins > 0).sum()), float((margins / self.scale).clamp(-1, 1).nan_to_num(-1).mean())
        return Trial(configuration, standing, margin, natural, fit=True, seconds=seconds)

    def _all(self, jobs: Sequence[Job]) -> list[tuple[Outcome, float]]:
        """Of each job every block's outcome, put together, and the seconds that they took."""
        found: dict[str, list[Outcome]] = {job.name: [] for job in jobs}
        for job, block, outcome in self.blocks.run_all(jobs):
            for key in job.fields:
                inner = self.x.shape[1:] if key == "examples" else ()
                if outcome[key].shape != (len(block), *inner):
                    raise ValueError(f"{job.name}: {key} in the unfinished run are not of {len(block)} inputs")
            found[job.name].append(outcome)
        seconds = [sum(float(outcome["seconds"]) for outcome in found[job.name]) for job in jobs]
        self.spent += sum(seconds)
        whole = [{key: torch.cat([part[key] for part in found[job.name]]) for key in job.fields} for job in jobs]
        return list(zip(whole, seconds, strict=True))

    def _inputs(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.x[indices].to(self.device), self.y[indices].to(self.device)

    def _attack(self, module: nn.Module, x: Tensor, y: Tensor, along: Sequence[Context]) -> tuple[Tensor, Tensor]:
        """The smallest lead of the right class that APGD came by, (n,) float64 on the CPU, and where, in x's shape."""
        setting = Setting(self.threat, self.classes, tuple(x.shape[1:]), self.blocks.seed, self.device)
        least, at = _lead(module(x.clone()), y), x.clone()
        for context in along:
            tools = toolbox(Logits(module, self.batch_size, context, finite=True), setting)
            further.set_steps(tools.apgd, STEPS)
            tools.apgd.loss = "ce"
            tools.apgd.init_hyperparam(x)
            steepest, _, _, fooling = tools.apgd.attack_single_run(x.clone(), y.clone())
            for point in (steepest, fooling):
                lead = _lead(module(point.clone()), y)
                closer = lead < least
                at[closer] = point[closer]
                least = torch.where(closer, lead, least)
        return least, at


def _lead(logits: Tensor, y: Tensor) -> Tensor:
    """`gradients.lead`, in float64 on the CPU."""
    return gradients.lead(logits.double(), y).cpu()
