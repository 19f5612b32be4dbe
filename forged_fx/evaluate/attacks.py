"""The table of attacks, and the presets that choose from it. To add one: a function and a row.

The functions here are those of AutoAttack (Croce and Hein, ICML 2020), with the parameters that pyautoattack's own
"standard" version sets. Its attack objects are called exactly as its run loop calls them, one batch at a time and
seeded per batch, so that a row equals pyautoattack's own figure. The loop itself is not used: it counts calls in a
module global, takes the process's trace function, and keeps its state in a file without the examples.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from forged_fx import checked
from forged_fx.evaluate import further, transfer
from forged_fx.evaluate.gradients import Logits
from forged_fx.evaluate.threat import Threat
from forged_fx.extras import need


@dataclass(frozen=True)
class Setting:
    """What an attack has to know beside the inputs. `shape` is that of one input, without the batch."""

    threat: Threat
    classes: int
    shape: tuple[int, ...]
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Attack:
    """`run(tools, x, y)` gives one example per input, adversarial or not; x (n, ...) float32, y (n,) int64.

    `unfit(setting)` is the reason why it cannot be run, or "". gradient: it uses one, so BPDA makes a second row.
    stage: the kind of its first row, which says what it is shown. "transfer": its examples are made on each side and
    shown to both. starts: `run` takes a fourth argument, an adversarial example of the other side for each input, and
    the attack is run where there is one. borrows: the gradient is the other side's, see `gradients.Borrowed`. prepare:
    sets the toolbox, before all. passes: about how often, at most, an input goes forward through the model, for the
    progress bar; 0: not known.
    """

    name: str
    run: Callable[..., Tensor]
    unfit: Callable[[Setting], str] = lambda setting: ""
    gradient: bool = True
    stage: str = "true gradient"
    starts: bool = False
    borrows: bool = False
    prepare: Callable[[Any], None] = lambda tools: None
    passes: Callable[[Any], int] = lambda tools: 0


def toolbox(logits: Logits, setting: Setting) -> Any:
    """pyautoattack's AutoAttack, standard version: the holder of attack objects and of their parameters."""
    tools = need("pyautoattack").AutoAttack(
        logits,
        norm=setting.threat.norm,
        eps=setting.threat.eps,
        seed=setting.seed,
        version="standard",
        device=setting.device,
    )
    quiet = logging.Logger("forged_fx.evaluate", level=logging.CRITICAL)
    for attack in (tools.apgd, tools.apgd_targeted):
        attack.logger = quiet  # what it would warn about, each batch anew, is read off the rows
    for attack in (tools.apgd_targeted, tools.fab):
        attack.n_target_classes = min(attack.n_target_classes, setting.classes - 1)
    return tools


def _apgd_ce(tools: Any, x: Tensor, y: Tensor) -> Tensor:
    tools.apgd.loss = "ce"
    tools.apgd.seed = tools.get_seed()
    return tools.apgd.perturb(x, y)


def _apgd_t(tools: Any, x: Tensor, y: Tensor) -> Tensor:
    tools.apgd_targeted.seed = tools.get_seed()
    return tools.apgd_targeted.perturb(x, y)


def _fab_t(tools: Any, x: Tensor, y: Tensor) -> Tensor:
    tools.fab.targeted, tools.fab.n_restarts = True, 1
    tools.fab.seed = tools.get_seed()
    return tools.fab.perturb(x, y)


def _square(tools: Any, x: Tensor, y: Tensor) -> Tensor:
    tools.square.seed = tools.get_seed()
    return tools.square.perturb(x, y)


def _unfit_apgd_t(setting: Setting) -> str:
    if setting.classes < 4:
        return f"the targeted DLR loss needs 4 classes, and there are {setting.classes}"
    return ""


def _unfit_square(setting: Setting) -> str:
    if len(setting.shape) != 3:
        return f"needs images (channels, height, width), not inputs of shape {setting.shape}"
    _, height, width = setting.shape
    if setting.threat.norm == "Linf":
        return ""
    side = height // 5  # its L2 and L1 starts tile the image with squares of this side, from this margin on
    margin = (height - 5 * side) // 2
    tiled = all(side == 1 or margin + side * (length // side) <= length for length in (height, width) if side)
    return "" if side and tiled else f"its {setting.threat.norm} start does not fit {height} x {width} images"


def _unfit_mi(setting: Setting) -> str:
    return "defined for Linf and L2 only" if setting.threat.norm == "L1" else ""


def _unfit_di(setting: Setting) -> str:
    if len(setting.shape) != 3:
        return f"needs images (channels, height, width), not inputs of shape {setting.shape}"
    return _unfit_mi(setting)


ATTACKS = {
    attack.name: attack
    for attack in (
        Attack("apgd-ce", _apgd_ce, passes=lambda tools: tools.apgd.n_restarts * (tools.apgd.n_iter + 2)),
        Attack(
            "apgd-t",
            _apgd_t,
            _unfit_apgd_t,
            passes=lambda tools: tools.apgd_targeted.n_target_classes * (tools.apgd_targeted.n_iter + 2),
        ),
        Attack("fab-t", _fab_t, passes=lambda tools: 2 * tools.fab.n_target_classes * tools.fab.n_iter),
        Attack("square", _square, _unfit_square, gradient=False, passes=lambda tools: tools.square.n_queries + 2),
        Attack("mi-fgsm", transfer.mi_fgsm, _unfit_mi, stage="transfer"),
        Attack("di-fgsm", transfer.di_fgsm, _unfit_di, stage="transfer"),
        Attack("apgd-restart", further.restart, stage="further", starts=True),
        Attack("square-20000", _square, _unfit_square, gradient=False, stage="further", prepare=further.queries),
        Attack("noise", further.noise, gradient=False, stage="further"),
        Attack("apgd-random", further.restart, stage="further"),
        Attack("apgd-borrowed", further.restart, stage="further", borrows=True),
        Attack("apgd-restart-borrowed", further.restart, stage="further", starts=True, borrows=True),
    )
}
AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
STRONGEST = "strongest"  # the row that broke most until then, `further.LONGER` times as long


def follows(row: str) -> bool:
    """Whether a row of this name, which begins with its attack's, follows the model's own gradient, and no stand-in."""
    attack = ATTACKS.get(re.split(r"[ ,]", row)[0])
    return attack is not None and attack.gradient and not attack.borrows and not re.search("BPDA|sigmoid", row)


@dataclass(frozen=True)
class Plan:
    """Names of attacks by what they are shown, in the order of running.

    smooth: BPDA with the smooth surrogates. rounds: run again and again, along every gradient, until the figure stops
    moving.
    """

    true: tuple[str, ...]
    bpda: tuple[str, ...]
    smooth: tuple[str, ...] = ()
    transfer: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    rounds: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for field in fields(self) for name in getattr(self, field.name)))

    @property
    def complete(self) -> bool:
        return set(AUTOATTACK) <= set(self.true)


# FAB is as costly as everything else that uses a gradient, and under BPDA it found nothing that APGD had left (see
# docs/evaluation.md): only the thorough plan repeats it there.
_ROUNDS = ("apgd-random", "apgd-restart", "apgd-borrowed", "apgd-restart-borrowed")
# The smooth surrogates see what the jump at a threshold is worth to an attacker, and neither the true gradient nor the
# straight-through one does (see docs/findings-on-real-models.md): every plan follows them.
_SMOOTH = AUTOATTACK[:1]
_STANDARD = Plan(AUTOATTACK, AUTOATTACK[:2], _SMOOTH, ("mi-fgsm", "di-fgsm"))
_THOROUGH = replace(
    _STANDARD,
    bpda=AUTOATTACK[:3],
    smooth=AUTOATTACK[:2],
    further=("apgd-restart", "square-20000", "noise", STRONGEST),
)
PRESETS = {
    "quick": Plan(AUTOATTACK[:2], AUTOATTACK[:2], _SMOOTH),
    "standard": _STANDARD,
    "thorough": _THOROUGH,
    "adaptive": replace(_STANDARD, rounds=_ROUNDS),
    "relentless": replace(_THOROUGH, rounds=_ROUNDS),
}


def choose(attacks: str | list[str] | tuple[str, ...]) -> Plan:
    """A preset, or the plan that runs the attacks named, each where its row of the table says."""
    if isinstance(attacks, str) and attacks in PRESETS:
        return PRESETS[attacks]
    names = [attacks] if isinstance(attacks, str) else list(dict.fromkeys(checked.several(attacks, "attacks", "names")))
    unknown = [name for name in names if name not in (*ATTACKS, STRONGEST)]
    if unknown or not names:
        raise ValueError(
            f"attacks={attacks!r}: {'unknown ' + ', '.join(map(repr, unknown)) if unknown else 'none named'}; "
            f"choose {' or '.join(map(repr, PRESETS))}, or name some of {', '.join((*ATTACKS, STRONGEST))}"
        )
    if names == [STRONGEST]:
        raise ValueError(
            f"attacks={attacks!r}: that runs again, and longer, what broke most of {', '.join(AUTOATTACK)}: name "
            "one of them beside it"
        )
    stages = {name: ATTACKS[name].stage if name in ATTACKS else "further" for name in names}
    true, moved, more = (tuple(n for n in names if stages[n] == s) for s in ("true gradient", "transfer", "further"))
    smooth = tuple(name for name in true if name in _SMOOTH)
    return Plan(true, tuple(name for name in true if ATTACKS[name].gradient), smooth, moved, more)
