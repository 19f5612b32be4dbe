"""The public call: which rows are run, in which order, and why."""

import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from forged_fx import checked, randomness
from forged_fx.bpda import straight_through
from forged_fx.evaluate import blocks as unit
from forged_fx.evaluate import checks, copies, fingerprint, further, gallery, gradients, past, reach, scale, surrogate
from forged_fx.evaluate.attacks import ATTACKS, STRONGEST, Attack, Plan, Setting, choose
from forged_fx.evaluate.blocks import Blocks
from forged_fx.evaluate.compiled import ROUNDING
from forged_fx.evaluate.findings import Case, examine, exceeds
from forged_fx.evaluate.gradients import Context
from forged_fx.evaluate.harness import Subject
from forged_fx.evaluate.journal import agree
from forged_fx.evaluate.probes import PROBED, BaseProbes, probe, probe_base
from forged_fx.evaluate.record import begin, call, finish, verify
from forged_fx.evaluate.result import Result, Row
from forged_fx.evaluate.terminal import Progress
from forged_fx.extras import need
from forged_fx.memory import at_half_the_batch
from forged_fx.processes import joined

NO_BASE = "there is no base to make its examples on"
REPEAT = "no gradient changes: the same row again"
UNREACHED = "no gradient changes, though there are thresholds: they are out of its reach, or cut nothing"
COSTLY = "APGD under BPDA finds more in less time; attacks='thorough' runs it"

Tried = list[tuple[Row, Attack, Context, str]]  # the last: along which gradient


@at_half_the_batch
def evaluate(
    model: nn.Module,
    base: nn.Module | None = None,
    *,
    x: Tensor,
    y: Tensor,
    eps: float,
    norm: str = "Linf",
    attacks: str | list[str] | tuple[str, ...] = "standard",
    seed: int = 0,
    batch_size: int = 250,
    folder: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    bpda: Context | None = None,
    shard: bool | None = None,
) -> Result:
    """Judge `model` by its worst case under attack, beside that of `base`, the model that it was made from.

    Args:
        model, base: classifiers; x -> logits (n, classes). Judged in eval mode, and handed back as they were. They
            may be on any device, each on one. A compiled one is attacked eagerly, if that is the same function, and
            what is found is asked of the compiled one; otherwise compiled (`compiled.py`); the notes say which.
        x: inputs, (n, channels, height, width) or another shape that the models take, float32 in [0, 1].
        y: classes, (n,), integer.
        eps, norm: the attacker's ball, in units of x; "Linf", "L2" or "L1".
        attacks: "standard" (AutoAttack's four: apgd-ce, apgd-t, fab-t, square; mi-fgsm and di-fgsm to transfer),
            "quick" (the first two), "thorough" (standard and what `attacks.PRESETS` adds, some four times as long),
            "adaptive" (standard, then along every gradient of the defence's own kind and along the base's, in rounds
            until the figure stops moving), "relentless" (thorough with these rounds), or a list of names. Anything less
            than AutoAttack's four can refute a gain and never show one; where one of them is not defined for the
            inputs, that goes for anything less than "relentless".
        seed: of all attacks, each block of 250 inputs anew, as AutoAttack does.
        batch_size: how many inputs the models are fed at a time, which bounds the memory; if that does not suffice,
            once half as many, and a warning says so. Below 250 each attack step costs one more forward pass, because
            the backward runs it again. The outcome is the same, as far as a model's arithmetic for one input does not
            depend on how many others there are.
        folder: where the run is recorded, block by block, and at last its result. Killed at any moment, the same call
            goes on and ends with the same result. If the folder holds that result already, its examples are verified
            and it is returned. If it holds anything of another call, the error says what differs.
        progress: on standard error. None: if that is a terminal.
        bpda: a context manager under which the model's backward is the straight-through one, decided when the
            forward runs. None: `forged_fx.straight_through`. For defences that are not this library's own; do not call
            `evaluate` within it. A run in a folder is known by its name, and by the arguments of a functools.partial.
            (Within `forged_fx.straight_through` it may be called: that does not reach in.)
        shard: share the blocks among the processes that torchrun started, or that torch.distributed has. All of them
            must make the same call, each with its own copy of the models, and get the same result, that of one
            process; process 0 alone prints and writes. None: if there are any. False: this process alone.

    The rows, each run only on what the rows before it left standing:
        1. natural: what is wrong without attack;
        2. true gradient: the attacks as they are. This is AutoAttack, and comes first so that its figure is known;
        3. BPDA: those that use a gradient, again, with the straight-through one (Athalye, Carlini, Wagner 2018), and
           apgd-ce (if thorough, apgd-t too) with smooth surrogates of the threshold. Left out, and said so, where that
           changes no gradient: a plain base has nothing to see through. FAB is repeated if thorough, or named;
        4. transfer: the adversarial examples found on the other side, shown to this one; then examples that are made
           to transfer, on each side, shown to both. So both sides face the same pool of examples, and neither looks
           better for having been attacked less;
        5. further, if thorough: APGD from the other side's examples, Square with 20,000 queries, random noise, the
           strongest rows so far with five times the steps; if adaptive or relentless: rounds of APGD with new starts
           and ever more steps, along every gradient that differs and along the other side's own, until two rounds in a
           row break nothing. And transfer again.

    An example counts as broken only if it lies inside the ball and the box [0, 1] (rounding: `Threat.tolerance`) and
    is classified wrongly when asked again. The worst case counts as right what no row broke. The verdict's rules
    are in `verdict.py`, the interval in `statistics.py`.

    Raises:
        TypeError, ValueError: the input cannot be judged; the message says why and what to do.
        FileExistsError: `folder` holds the run of another call. BlockingIOError: another process works on it.
        ImportError: `pip install forged_fx[eval]`.
    """
    model = checks.attacked(model, "model")
    base = None if base is None else checks.attacked(base, "base")
    threat = checks.threat(eps, norm)
    x, y = checks.inputs(x, y)
    plan = choose(attacks)
    seed, batch_size = checked.whole_number(seed, "seed"), checked.whole_number(batch_size, "batch_size", 1)
    versions = {
        "forged_fx": version("forged_fx"),
        "pyautoattack": need("pyautoattack").__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    data = {"x_shape": list(x.shape), **fingerprint.of_data(x, y)}
    if folder is not None:
        checked.folder(folder, "evaluate")
    bpda = bpda or straight_through
    checks.context(bpda)
    bpda_name, told = gradients.name_of(bpda)
    if folder is not None and not told:
        raise ValueError(
            f"bpda is {bpda_name}, by which a run in a folder cannot be told from another's: pass a function, a class, "
            "or functools.partial of one with numbers and text"
        )

    with ExitStack() as stack:
        enter = stack.enter_context
        training = enter(checks.at_peace({"model": model} if base is None else {"model": model, "base": base}))
        notes = [f"the {who} was in train mode; judged in eval mode" for who, modules in training.items() if modules]
        notes += filter(None, [checks.pair(model, base) if base is not None else ""])
        among = copies.among(x)
        notes += filter(None, [copies.said(len(x), among)])
        processes = enter(joined(shard, "evaluate"))
        for note in notes if processes.rank == 0 else ():
            warnings.warn(note, stacklevel=3)  # above `at_half_the_batch`
        blocks, shown = Blocks(seed, processes), Progress(progress if processes.rank == 0 else False)
        subject = Subject("model", model, x, y, threat, batch_size, blocks, shown)
        rival = Subject("base", base, x, y, threat, batch_size, blocks, shown) if base is not None else None
        asked: dict[str, Any] = {
            "plan": {kind: list(names) for kind, names in asdict(plan).items()},
            "seed": seed,
            "block": unit.BLOCK,
            "bpda": bpda_name,
            "data": data,
            "versions": versions,
        }
        whole = call(threat, **asked, model=subject.identity, base=rival and rival.identity)
        models = {"the model": model} | ({} if base is None else {"the base": base})
        agree(processes, whole, models, folder="none" if folder is None else "given")
        command = list(sys.argv)
        if folder is not None:
            journal, finished = begin(folder, whole | {"command": command}, processes)
            if finished:
                verify(finished, model, x, y, base, bpda)
                return finished
            command = json.loads(processes.first(lambda: json.dumps(journal.command).encode()))
            if journal:
                blocks.journal, shown.log = enter(journal), journal.log_once
                journal.log(f"{journal.resumed} blocks are finished" if journal.resumed else f"began: {len(x)} inputs")
        enter(shown)

        logits = subject.natural()
        classes = logits.shape[1]
        base_logits = rival.natural(classes) if rival else None
        sides = [side for side in (rival, subject) if side]
        settings = {side.name: side.setting(classes) for side in sides}
        contest(sides, plan, settings, bpda)

        randomness.seed(seed)  # a model may draw, and the last block may have come from an unfinished run
        apart = reach.apart(subject, rival, logits, base_logits) if rival else math.inf
        case = _case(subject, rival, logits, apart, training["model"], settings["model"], bpda)
        result = Result(
            n=len(x),
            threat=threat,
            attacks=plan.names,
            complete=plan.complete and not case.model.undefined,
            batch_size=batch_size,
            model=case.model,
            base=case.base,
            same=case.same,
            command=command,
            machine={
                "device": _device(subject.device),
                "threads": torch.get_num_threads(),
                "processes": processes.size,
            },
            **asked,
            notes=notes + [note for side in sides for note in side.notes],
            findings=examine(case),
            probe_seconds=case.probes.seconds,
            gallery=subject.show(gallery.choose(case.model)),
            copies=among,
        )
        if folder is not None:
            processes.first(lambda: finish(result, folder, journal))
    return result


def contest(sides: Sequence[Subject], plan: Plan, settings: Mapping[str, Setting], bpda: Context) -> None:
    """All rows after the natural one, on every side; what is found on any is shown to all. The base comes first, if
    there is one."""
    tried = {side.name: by_gradient(side, plan, settings[side.name], bpda) for side in sides}
    _share(sides, "transfer")
    for name in plan.transfer:
        for side in sides:
            if len(sides) > 1:
                side.share(ATTACKS[name], settings[side.name], bpda, sides)
            else:
                side.attack(ATTACKS[name], "transfer", settings[side.name], bpda, skip=NO_BASE)
    if plan.further or plan.rounds:
        for side in sides:
            other = next((one for one in sides if one is not side), None)
            furthermore(side, other, plan, settings[side.name], bpda, tried[side.name])
            in_rounds(side, other, plan, settings[side.name], bpda, tried[side.name])
        _share(sides, "further")


def _share(sides: Sequence[Subject], kind: str) -> None:
    for side in reversed(sides):
        for other in sides:
            if other is not side:
                side.replay(other, kind)


def by_gradient(side: Subject, plan: Plan, setting: Setting, bpda: Context) -> Tried:
    """The rows that attack a side by itself: with its true gradient, under BPDA, with the smooth surrogates."""
    tried: Tried = []

    def run(name: str, kind: str, context: Context, skip: str = "", surrogate: str = "") -> None:
        attack = replace(ATTACKS[name], name=f"{name}, {surrogate}" if surrogate else name)
        row = side.attack(attack, kind, setting, context, skip=skip)
        tried.append((row, attack, context, surrogate or kind))

    for name in plan.true:
        run(name, "true gradient", nullcontext)
    left_out = UNREACHED if reach.held(side.model) else REPEAT
    repeat = "" if not plan.true or side.sees_through(bpda) else left_out
    for name in plan.true:
        if ATTACKS[name].gradient:
            run(name, "BPDA", bpda, repeat or ("" if name in plan.bpda else COSTLY))
    for temperature in surrogate.TEMPERATURES if plan.smooth else ():
        smooth, label = partial(surrogate.smooth, temperature), f"sigmoid {temperature:g}"
        repeat = "" if side.sees_through(smooth, label) else left_out
        for name in plan.smooth:
            run(name, "BPDA", smooth, repeat, label)
    return tried


def furthermore(
    side: Subject, other: Subject | None, plan: Plan, setting: Setting, bpda: Context, tried: Tried
) -> None:
    """The rows of kind "further"."""
    for name in plan.further:
        if name != STRONGEST:
            attack = ATTACKS[name]
            if attack.gradient and not attack.borrows and _differs(side, bpda):
                attack = replace(attack, name=f"{name}, BPDA")
            side.attack(attack, "further", setting, bpda, other=other)
            continue
        found = [entry for entry in tried if entry[0].broken]
        most = max(found, key=lambda entry: entry[0].broken, default=None)
        for entry in found:  # the row that broke most, and the last to break what all before it had left
            if entry is most or entry is found[-1]:
                row, attack, context, _ = entry
                label = f"{attack.name} ({row.kind}), {further.LONGER} times as long"
                side.attack(replace(attack, name=label, prepare=further.lengthen), "further", setting, context)


def _differs(side: Subject, bpda: Context) -> bool:
    """Whether BPDA's gradient is another one than the true one."""
    known = side.changes.get("BPDA")
    return side.sees_through(bpda) if known is None else known


def in_rounds(side: Subject, other: Subject | None, plan: Plan, setting: Setting, bpda: Context, tried: Tried) -> None:
    """Rows of kind "further" until the figure stops moving: each round with new starts, and more steps than the last.

    Along every gradient that was found to differ from the others.
    """
    ways = {"true gradient": nullcontext} | {way: context for row, _, context, way in tried if row.attacked}
    quiet, number = 0, 0
    while plan.rounds and quiet < further.QUIET and number < further.ROUNDS:
        number += 1
        before, again = len(side.standing()), replace(setting, seed=setting.seed + number)
        for name in plan.rounds:
            attack = replace(ATTACKS[name], prepare=partial(further.more_steps, times=number))
            for way, context in ({"": bpda} if attack.borrows else ways).items():
                label = further.in_round(f"{name}, {way}" if way else name, number)
                side.attack(replace(attack, name=label), "further", again, context, other=other)
        quiet = 0 if len(side.standing()) < before else quiet + 1


def _case(
    side: Subject, base: Subject | None, logits: Tensor, apart: float, training: int, setting: Setting, bpda: Context
) -> Case:
    """What the checks look at, measured after all rows. apart: see `reach.apart`; infinite where there is no base."""
    alike, own = apart <= ROUNDING, bpda is straight_through
    probes = probe(side, setting, bpda)
    base_probes = BaseProbes()
    if base is not None:
        base_probes = with_more(probe_base(base, base.setting(logits.shape[1]), bpda), base, side)
    jumps = reach.jumps(side, base, alike)
    randomness.seed(setting.seed)  # what follows is in no block
    return Case(
        model=side.side(),
        base=base.side() if base is not None else None,
        same=apart == 0,
        logits=logits,
        probes=probes,
        training=training,
        outside=int(((side.x < 0) | (side.x > 1)).sum()),
        scale=scale.of(side.attacked, side.x[:PROBED].to(side.device), side.batch_size),
        base_probes=base_probes,
        thresholds=reach.thresholds(side, own, alike),
        jumps=jumps,
        past=past.depends(side, base, probes.drift),
    )


def with_more(probes: BaseProbes, base: Subject, other: Subject | None = None) -> BaseProbes:
    """With what else is asked of a base. other: a side whose examples it is asked, too."""
    remembers = exceeds(past.depends(base, other, probes.drift))
    return replace(probes, jumps=reach.base_jumps(base), remembers=remembers)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
