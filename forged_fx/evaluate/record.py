"""A result as a folder, of which nothing is executed on loading.

result.json            rows, outcome by example, seeds, versions, fingerprints, command, headline
examples.safetensors   for the model and the base: the broken inputs' indices, and what broke each; and a gallery of a
                       few inputs as they were
timing.json            how long each row took, and on what; apart, because it is all that differs when a run is repeated
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from math import inf, isclose, prod
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from forged_fx import checked
from forged_fx.bpda import straight_through
from forged_fx.evaluate import answers, checks, fingerprint, journal
from forged_fx.evaluate.gallery import SHOWN, Gallery
from forged_fx.evaluate.gradients import Context, lead, predicted
from forged_fx.evaluate.journal import UNFINISHED, Call, Journal
from forged_fx.evaluate.result import KINDS, STANDING, UNDER_BPDA, Finding, Result, Row, Side
from forged_fx.evaluate.threat import Threat
from forged_fx.extras import need
from forged_fx.files import whole
from forged_fx.models import device_of
from forged_fx.processes import Processes
from forged_fx.randomness import kept_randomness

FORMAT = 2
RECORD, EXAMPLES, TIMING = "result.json", "examples.safetensors", "timing.json"
WRITES = (EXAMPLES, TIMING)  # besides the record
NEXT = "next.examples.safetensors"  # of a result whose record is not written yet
_HINTS = get_type_hints(Result)
BOUNDARY = 1e-4  # a lead of the right class by this share of the largest logit is rounding
HEADER = 2**20  # bytes of a safetensors file beside its tensors, at most
# fields of a Result that are written as they are
PLAIN = (
    *("n", "attacks", "plan", "complete", "seed", "batch_size", "block", "bpda", "same"),
    *("data", "versions", "command", "notes"),
)


def vacant(folder: str | os.PathLike[str]) -> None:
    """FileExistsError if the folder holds a result, or an unfinished run."""
    if (Path(folder) / RECORD).exists():
        raise FileExistsError(f"{folder} holds a result; choose another folder, or save(folder, overwrite=True)")
    if (Path(folder) / UNFINISHED).exists():
        raise FileExistsError(f"{folder} holds an unfinished run; choose another folder")
    journal.unwritten(Path(folder), WRITES)


def call(threat: Threat, **rest: Any) -> Call:
    """What is asked of `evaluate`. rest: model, base (identities), seed, plan, block, bpda, data, versions."""
    return {"threat": asdict(threat), **rest}


def call_of(result: Result) -> Call:
    """The call that the result answers."""
    fields = {name: getattr(result, name) for name in ("threat", "plan", "seed", "block", "bpda", "data", "versions")}
    return call(**fields, model=result.model.identity, base=result.base.identity if result.base else None)


def begin(folder: str | os.PathLike[str], asked: Call, processes: Processes) -> tuple[Journal | None, Result | None]:
    """See `journal.begin`."""
    processes.first(lambda: _settle(Path(folder)))
    return journal.begin(folder, asked, processes, RECORD, parse, writes=WRITES, read=_read, call_of=call_of)


def finish(result: Result, folder: str | os.PathLike[str], unfinished: Journal) -> None:
    """The result takes the unfinished run's place."""
    save(result, folder, overwrite=True)
    unfinished.log(f"finished: {result.verdict}: {result.sentence}")
    unfinished.finish()


def headline(result: Result) -> dict[str, Any]:
    """Every figure that the report shows, for other readers of result.json; computed, so never read back."""
    figures: dict[str, Any] = {"verdict": result.verdict, "sentence": result.sentence}
    for kind in reversed(result.kinds):
        figures[kind] = {side.name: side.accuracy(kind) for side in result.sides}
        if paired := result.compared(kind):
            figures[kind] |= asdict(paired) | {"difference": paired.difference}
    return figures


def robustbench(result: Result) -> dict[str, str]:
    """RobustBench's fields, in percent: AutoAttack as its standard has it, and the lower figure found beside it."""
    percent = {kind: f"{100 * result.model.accuracy(kind):.2f}" for kind in KINDS}
    fields = {"eps": _eps(result.threat), "clean_acc": percent["natural"], "external": percent[KINDS[-1]]}
    return fields | ({"autoattack_acc": percent["true gradient"]} if result.complete else {})


def _eps(threat: Threat) -> str:
    """As RobustBench writes it: grey levels as fractions of 255."""
    levels = 255 * threat.eps
    return f"{round(levels)}/255" if threat.norm == "Linf" and isclose(levels, round(levels)) else f"{threat.eps:.6g}"


def save(result: Result, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Killed at any moment, the folder holds the result that it held, or this one."""
    if not overwrite:
        vacant(folder)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for side in result.sides:
        tensors |= {f"{side.name}.index": side.broken, f"{side.name}.x": side.examples.contiguous()}
    if result.gallery is not None:
        tensors |= result.gallery.tensors()
    _settle(folder)
    there = folder / NEXT
    with whole(there) as path:
        need("safetensors.torch").save_file(tensors, path, {"format": str(FORMAT)})
    try:
        record = _json(_record_of(result, fingerprint.of_file(there)))
        timing = {
            "seconds": {side.name: [row.seconds for row in side.rows] for side in result.sides},
            "probe_seconds": result.probe_seconds,
            "machine": result.machine,
            "result_sha256": hashlib.sha256(record).hexdigest(),
        }
        _write(folder / TIMING, _json(timing))
        _write(folder / RECORD, record)  # from now on it is this result that the folder holds
    except BaseException:
        _settle(folder)
        there.unlink(missing_ok=True)
        raise
    os.replace(there, folder / EXAMPLES)


def _settle(folder: Path) -> None:
    """What a save that was killed has left: the examples of the result in the folder get their name."""
    with suppress(OSError, ValueError, KeyError):
        if fingerprint.of_file(folder / NEXT) == _record(checked.read(folder / RECORD))["examples_sha256"]:
            os.replace(folder / NEXT, folder / EXAMPLES)


def _record_of(result: Result, examples: str) -> dict[str, Any]:
    """What is in result.json. examples: the SHA-256 of their file."""
    return {
        "format": FORMAT,
        "headline": headline(result),
        "robustbench": robustbench(result),
        "threat": asdict(result.threat),
        **{name: getattr(result, name) for name in PLAIN},
        "sides": [
            {
                "name": side.name,
                "description": side.description,
                "fingerprint": side.fingerprint,
                "forging": side.forging,
                "answers": side.answers,
                "slopes": {what: found.tolist() for what, found in side.slopes.items()},
                "rows": [{k: v for k, v in asdict(row).items() if k != "seconds"} for row in side.rows],
                "broken_by": side.broken_by.tolist(),
            }
            for side in result.sides
        ],
        "findings": [asdict(finding) for finding in result.findings],
        "copies": result.copies,
        "examples_sha256": examples,
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    with whole(path) as part:
        part.write_bytes(content)


def _side(record: dict[str, Any], tensors: dict[str, Tensor], seconds: list[float], n: int, shape: list[int]) -> Side:
    name = record["name"]
    rows = [
        checked.build(Row, row, f"{name}.rows[{i}]", seconds=spent)
        for i, (row, spent) in enumerate(zip(record["rows"], seconds, strict=True))
    ]
    broken_by = torch.tensor(checked.fit(record["broken_by"], list[int], f"{name}.broken_by"), dtype=torch.int64)
    said, print_ = (checked.fit(record[key], str, f"{name}.{key}") for key in ("description", "fingerprint"))
    forging = checked.fit(record.get("forging"), str | None, f"{name}.forging")
    told = checked.fit(record.get("answers"), list[float] | None, f"{name}.answers")
    slopes = checked.fit(record.get("slopes", {}), dict[str, list[list[float]]], f"{name}.slopes")
    along = {what: torch.tensor(found, dtype=torch.float64) for what, found in slopes.items()}
    side = Side(name, said, print_, rows, broken_by, tensors[f"{name}.x"], forging, told, along)
    known = torch.arange(STANDING, len(side.rows))
    sound = (
        side.broken_by.shape == (n,)
        and bool(torch.isin(side.broken_by, known).all())
        and torch.equal(tensors[f"{name}.index"], side.broken)
        and list(side.examples.shape) == [len(side.broken), *shape]
        and side.examples.dtype == torch.float32
    )
    if not sound:
        raise ValueError(f"the {name}'s outcomes and its examples do not agree")
    if not rows or n < 1:
        raise ValueError(f"the {name} has no row")
    standing = n
    for i, row in enumerate(rows):
        broken = int((broken_by == i).sum())
        standing -= broken
        known = row.side == name and row.kind in (KINDS[:1] if i == 0 else KINDS[1:])
        if (
            not known
            or not 0 <= (row.alone or 0) <= 1
            or (row.broken, row.standing) != (broken, standing)
            or not 0 <= row.seconds < inf
        ):
            raise ValueError(f"the {name}'s row {i} and its outcomes do not agree")
    return side


def load(folder: str | os.PathLike[str]) -> Result:
    checked.path(folder, "Result.load")
    folder = Path(folder)
    if not (folder / RECORD).exists():
        if (folder / UNFINISHED).exists():
            raise FileNotFoundError(f"{folder} holds an unfinished run: the same call of evaluate finishes it")
        raise FileNotFoundError(f"{folder} holds no {RECORD}: evaluate(..., folder={str(folder)!r}) writes it")
    return parse(_read(folder), str(folder))


def _read(folder: Path) -> dict[str, bytes]:
    with _complete(str(folder)):
        files = {RECORD: checked.read(folder / RECORD)}
        if (folder / TIMING).exists():  # a result stands without it
            files[TIMING] = checked.read(folder / TIMING)
        record = _record(files[RECORD])
        shape, sides = checked.fit(record["data"]["x_shape"], list[int], "x_shape"), record["sides"]
        examples = sum(len(side["broken_by"]) for side in sides) * (8 + 4 * prod(shape[1:]))
        examples += SHOWN * (24 + 4 * prod(shape[1:]))
        for name in (EXAMPLES, NEXT):  # the other one if a save was killed: before the record was written, or after
            if (folder / name).exists():
                found = checked.read(folder / name, examples + HEADER)
                if EXAMPLES not in files or hashlib.sha256(found).hexdigest() == record["examples_sha256"]:
                    files[EXAMPLES] = found
        if EXAMPLES not in files:
            raise ValueError(f"{EXAMPLES} is missing")
        return files


def parse(files: dict[str, bytes], where: str) -> Result:
    """The result in these files; ValueError if they hold none. where: what to call them in an error."""
    with _complete(where):
        record = _record(files[RECORD])
        if hashlib.sha256(files[EXAMPLES]).hexdigest() != record["examples_sha256"]:
            raise ValueError(f"{EXAMPLES} is not the file that {RECORD} was written with")
        plain = {name: checked.fit(record[name], _HINTS[name], name) for name in PLAIN}
        tensors = need("safetensors.torch").load(files[EXAMPLES])
        n, shape = plain["n"], checked.fit(plain["data"]["x_shape"], list[int], "x_shape")
        for key in fingerprint.OF_DATA:
            checked.fit(plain["data"][key], str, key)
        if shape[0] != n:
            raise ValueError(f"it is of {n} inputs, and x_shape is {shape}")
        timing, damaged = _timing(files, {side["name"]: len(side["rows"]) for side in record["sides"]})
        seconds = timing["seconds"]
        sides = {s["name"]: _side(s, tensors, seconds[s["name"]], n, shape[1:]) for s in record["sides"]}
        if list(sides) not in (["model"], ["model", "base"]) or len(sides) < len(record["sides"]):
            raise ValueError(f"its sides are {checked.short(list(sides))}")
        threat = checked.build(Threat, record["threat"], "threat")
        copies = checked.fit(record.get("copies", []), list[int], "copies")  # an earlier version did not say
        if not set(copies) <= set(range(1, n)):
            raise ValueError(f"of {n} inputs copies are said to be {checked.short(copies)}")
        return Result(
            threat=checks.threat(threat.eps, threat.norm),
            model=sides["model"],
            base=sides.get("base"),
            findings=[_finding(finding, f"findings[{i}]") for i, finding in enumerate(record["findings"])],
            machine=timing["machine"],
            probe_seconds=timing["probe_seconds"],
            gallery=Gallery.of(tensors, sides["model"]),
            copies=copies,
            **plain | {"notes": plain["notes"] + damaged},
        )


def _timing(files: dict[str, bytes], rows: dict[str, int]) -> tuple[dict[str, Any], list[str]]:
    """What timing.json says of sides with so many rows, and a note if it is damaged: a result stands without it."""
    none = {"seconds": {name: [0.0] * count for name, count in rows.items()}, "machine": {}, "probe_seconds": 0.0}
    if TIMING not in files:
        return none, []
    kinds = {"seconds": dict[str, list[float]], "machine": dict[str, Any], "probe_seconds": float, "result_sha256": str}
    try:
        said = checked.fit(checked.parse(files[TIMING]), dict[str, Any], "it")
        known = {name: checked.fit(said.get(name), kind, name) for name, kind in kinds.items()}
        if known.pop("result_sha256") != hashlib.sha256(files[RECORD]).hexdigest():
            return none, []  # of another result, whose save was killed
        spent = [second for row in known["seconds"].values() for second in row]
        if {name: len(row) for name, row in known["seconds"].items()} != rows or not all(0 <= s < inf for s in spent):
            raise ValueError("its rows are not those of the result")
    except ValueError as error:
        damaged = checked.visible(str(error))[:200]
        return none, [f"{TIMING} is damaged ({damaged}): how long rows took, and on what, is not known"]
    return known, []


def _finding(record: Any, where: str) -> Finding:
    finding = checked.build(Finding, record, where)
    if finding.raised and finding.value is None:
        raise ValueError(f"{where} is raised without a value")
    return finding


def _record(data: bytes) -> dict[str, Any]:
    try:
        record = checked.parse(data)
    except ValueError as error:
        raise ValueError(f"{RECORD} is no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise ValueError(f"{RECORD} is of format {checked.short(found)}, and this version reads {FORMAT}")
    return record


@contextmanager
def _complete(where: str) -> Iterator[None]:
    """Whatever the files' content makes fail is a ValueError that says so, and the next step."""
    faults = (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError)
    try:
        yield
    except (*faults, need("safetensors").SafetensorError) as error:
        fault = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{where} holds no complete result ({fault}): evaluate anew, in another folder") from error


def _right(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Per input: whether it is classified rightly, and whether that is a matter of rounding."""
    logits, classes = logits.float().cpu(), classes.cpu()
    return predicted(logits) == classes, lead(logits, classes).abs() <= BOUNDARY * logits.abs().amax(1)


def verify(
    result: Result, model: nn.Module, x: Tensor, y: Tensor, base: nn.Module | None, bpda: Context | None = None
) -> int:
    """Check every example again: inside the ball and the box, and classified wrongly by its side. And every input: it
    is right without attack where it was when the result was made, or the model's code is another. And the gradient of a
    few, under `bpda` too, where that is given or the library's own.

    Returns how many lie on the boundary between two classes, to rounding (`BOUNDARY`), and fell to the right side
    of it this time: other hardware, or other company in the batch, suffices for that. So do all whose side draws random
    numbers, as the result found it to: its answers cannot be checked. ValueError says how many fail.
    """
    x, y = checks.inputs(x, y)
    if any(result.data[name] != digest for name, digest in fingerprint.of_data(x, y).items()):
        raise ValueError("x and y are not the data of this result")
    if bpda is None and result.bpda == straight_through.__qualname__:
        bpda = straight_through
    ways: dict[str, Context | None] = {"gradients": nullcontext, UNDER_BPDA: bpda}
    boundary, randomised = 0, any(one.raised for one in result.findings if one.name == "output randomised")
    for side, module in ((result.model, model), (result.base, base)):
        if side is None or module is None:
            continue
        right, close, astray, changed = 0, 0, 0, 0
        logits: list[Tensor] = []
        natural = side.broken_by == 0  # row 0: wrong without attack
        device = device_of(module, x.device)
        with checks.borrowed(module, side.name), torch.no_grad(), kept_randomness() as drawn:
            for part, examples in zip(
                side.broken.split(result.batch_size), side.examples.split(result.batch_size), strict=True
            ):
                logits.append(module(examples.clone().to(device)).cpu())
                is_right, is_close = _right(logits[-1], y[part])
                is_close &= is_right
                right, close = right + int((is_right & ~is_close).sum()), close + int(is_close.sum())
                astray += int((~result.threat.allows(x[part].cpu(), examples)).sum())
            size = result.batch_size
            for inputs, classes, was_wrong in zip(x.split(size), y.split(size), natural.split(size), strict=True):
                logits.append(module(inputs.clone().to(device)).cpu())
                is_right, is_close = _right(logits[-1], classes)
                changed += int(((is_right == was_wrong) & ~is_close).sum())
            if side.answers is not None:
                logits.append(checks.answers(module, answers.moved(x, result.threat), size, side.name))
            turned = [
                what
                for what, before in side.slopes.items()
                if (way := ways.get(what)) and not answers.same_slopes(before, answers.slopes(module, x, size, way))
            ]
            draws = drawn() and (side is result.base or randomised)
            if draws:
                close, right, changed = close + right, 0, 0
        if right or astray:
            raise ValueError(
                f"the {side.name}: of {len(side.broken)} examples {right} are classified rightly, and "
                f"{astray} lie outside the ball or the box"
            )
        if changed:
            raise ValueError(
                f"the {side.name}: {changed} of {len(x)} inputs are classified otherwise without attack than when the "
                "result was made, so its code has changed since; choose another folder"
            )
        if side.answers is not None and not draws:
            same = answers.same(side.answers, torch.cat(logits))
            checks.same_code(same, side.name, "the result in this folder was made")
        if turned and not draws:
            checks.same_code(False, side.name, "the result in this folder was made", turned[0])
        boundary += close
    return boundary
