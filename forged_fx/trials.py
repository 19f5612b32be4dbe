"""Trying configurations out: a short attack on the inputs on which the base's outcome is closest to turning.

It ranks, and proves nothing: what `evaluate` finds is what counts.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from forged_fx.configuration import Configuration
from forged_fx.evaluate import checks, fingerprint, further, gradients
from forged_fx.evaluate.attacks import Setting, toolbox
from forged_fx.evaluate.blocks import Blocks, Fields, Outcome
from forged_fx.evaluate.gradients import Context, Logits
from forged_fx.evaluate.report import Progress
from forged_fx.evaluate.threat import Threat
from forged_fx.stats import Stats

NEAR = 100  # inputs nearest to the boundary
STEPS = 20  # of APGD, along each gradient

MARGINS: Fields = {"margins": (torch.float64, 1)}
RIGHT: Fields = {"right": (torch.bool, 1)}
BEGUN: Fields = MARGINS | RIGHT | {"examples": (torch.float32, None)}


class Spent(Exception):
    """The budget is."""


@dataclass(frozen=True)
class Trial:
    """A configuration under the short attack.

    standing: of the inputs near the boundary, how many it still gets right. margin: the mean lead of the right class
    there, in units of the base's, each cut to [-1, 1]. natural: of all inputs, how many it gets right unattacked. fit:
    it loses no more of these than it may; one that is not fit is not attacked. seconds: of computing.
    """

    configuration: Configuration
    standing: int
    margin: float
    natural: int
    fit: bool
    seconds: float

    @property
    def score(self) -> tuple[bool, int, float, int]:
        """Larger is better; of two that do as well, the one with fewer sites."""
        return self.fit, self.standing, self.margin, -len(self.configuration.places)


class Trials:
    """made: the trials of everything but the base, in order; base: its own.

    near: indices of the inputs nearest to the boundary, (k,) int64: those that are right unattacked and whose class
    leads or lags least where the short attack on the base ends. budget: how many configurations; seconds: of computing,
    those of an earlier attempt included. To be used within `pool.at_peace`, of the model.
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
        self.budget, self.seconds = budget, math.inf if seconds is None else seconds
        self.blocks, self.batch_size, self.progress = blocks, batch_size, progress
        self.device = checks.device_of(model, x.device)
        self.example = ((x[:8].to(self.device),), {})
        self.classes = checks.logits(model(self.example[0][0]), x[:8], y[:8], "model").shape[1]
        self.made: dict[Configuration, Trial] = {}
        self.spent = 0.0
        self._find_near(max_natural_loss)
        progress.begin("trying configurations", budget)

    def _find_near(self, max_natural_loss: float) -> None:
        def attack(indices: Tensor) -> Outcome:
            x, y = self._inputs(indices)
            margins, worst = self._attack(self.model, x, y, [nullcontext])
            return {"margins": margins, "examples": worst.cpu(), "right": _lead(self.model(x), y) > 0}

        found, seconds = self._all("base", torch.arange(len(self.x)), attack, BEGUN)
        margins, right, self.examples = found["margins"], found["right"], found["examples"]
        nearest = margins.abs().masked_fill(~right, math.inf).argsort(stable=True)
        self.near = nearest[: min(NEAR, int(right.sum()))].sort().values
        if not len(self.near):
            raise ValueError("the model is wrong on every input of the search: there is nothing to make robust")
        self.scale = max(float(margins[self.near].abs().mean()), 1e-12)
        self.least = int(right.sum()) - max_natural_loss * len(self.x)
        self.base = self._trial(Configuration(), margins[self.near], int(right.sum()), seconds)

    def try_out(self, configuration: Configuration) -> Trial:
        """Its trial: made now, or before. Raises Spent where a new one would go beyond the budget."""
        if not configuration.places:
            return self.base
        if configuration not in self.made:
            if len(self.made) >= self.budget or self.spent >= self.seconds:
                raise Spent
            self.made[configuration] = trial = self._make(configuration)
            self.progress.advance(1)
            natural = f"natural {trial.natural}" + ("" if trial.fit else ", too few")
            self.progress.log(f"{configuration}: {trial.standing} stand, margin {trial.margin:+.3f}, {natural}")
        return self.made[configuration]

    def _make(self, configuration: Configuration) -> Trial:
        forged: list[nn.Module] = []  # only where something is left to do

        def module() -> nn.Module:
            if not forged:
                forged.append(configuration.forge(self.model, self.stats, self.example))
            return forged[0]

        def ask(indices: Tensor) -> Outcome:
            x, y = self._inputs(indices)
            logits = torch.cat([module()(part) for part in x.split(self.batch_size)])
            return {"right": _lead(logits, y) > 0}

        def attack(indices: Tensor) -> Outcome:
            x, y = self._inputs(indices)
            shown = _lead(module()(self.examples[indices].to(self.device)), y)  # the base's: transfer
            margins, _ = self._attack(module(), x, y, [nullcontext, gradients.straight_through()])
            return {"margins": margins.minimum(shown)}

        name = fingerprint.of_tensors([("configuration", configuration.record())])[:16]
        asked, seconds = self._all(f"{name} natural", torch.arange(len(self.x)), ask, RIGHT)
        natural = int(asked["right"].sum())
        if natural < self.least:
            return self._trial(configuration, torch.full((len(self.near),), -math.inf), natural, seconds)
        found, more = self._all(f"{name} attacked", self.near, attack, MARGINS)
        return self._trial(configuration, found["margins"], natural, seconds + more)

    def _trial(self, configuration: Configuration, margins: Tensor, natural: int, seconds: float) -> Trial:
        standing, margin = int((margins > 0).sum()), float((margins / self.scale).clamp(-1, 1).mean())
        return Trial(configuration, standing, margin, natural, natural >= self.least, seconds)

    def _all(
        self, name: str, indices: Tensor, work: Callable[[Tensor], Outcome], fields: Fields
    ) -> tuple[Outcome, float]:
        """Every block's outcome, put together, and the seconds that they took."""
        outcomes = [outcome for _, outcome in self.blocks.run(name, indices, work, fields)]
        seconds = sum(float(outcome["seconds"]) for outcome in outcomes)
        self.spent += seconds
        return {key: torch.cat([outcome[key] for outcome in outcomes]) for key in fields}, seconds

    def _inputs(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.x[indices.to(self.x.device)], self.y[indices.to(self.y.device)]
        return x.to(self.device), y.to(self.device)

    def _attack(self, module: nn.Module, x: Tensor, y: Tensor, along: Sequence[Context]) -> tuple[Tensor, Tensor]:
        """The smallest lead of the right class that APGD came by, (n,) float64 on the CPU, and where, in x's shape."""
        setting = Setting(self.threat, self.classes, tuple(x.shape[1:]), self.blocks.seed, self.batch_size, self.device)
        least, at = _lead(module(x), y), x.clone()
        for context in along:
            tools = toolbox(Logits(module, self.batch_size, context), setting)
            further.set_steps(tools.apgd, STEPS)
            tools.apgd.loss = "ce"
            tools.apgd.init_hyperparam(x)
            steepest, _, _, fooling = tools.apgd.attack_single_run(x.clone(), y.clone())
            for point in (steepest, fooling):
                lead = _lead(module(point), y)
                closer = lead < least
                at[closer.to(at.device)] = point[closer.to(at.device)]
                least = torch.where(closer, lead, least)
        return least, at


def _lead(logits: Tensor, y: Tensor) -> Tensor:
    """Of the right class over the best other, (n,) float64 on the CPU; above 0: it is classified rightly."""
    logits = logits.double()
    own = logits.gather(1, y[:, None]).squeeze(1)
    return (own - logits.scatter(1, y[:, None], -math.inf).amax(1)).cpu()
