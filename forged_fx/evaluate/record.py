"""A result as a folder of two files, of which nothing is executed on loading.

result.json            rows, outcome by example, seeds, versions, fingerprints, headline
examples.safetensors   for the model and the base: the broken inputs' indices, and what broke each
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forged_fx.evaluate import checks, fingerprint
from forged_fx.evaluate.extras import need
from forged_fx.evaluate.harness import predict
from forged_fx.evaluate.result import KINDS, STANDING, Finding, Result, Row, Side
from forged_fx.evaluate.threat import Threat

FORMAT = 1
RECORD, EXAMPLES = "result.json", "examples.safetensors"
# fields of a Result that are written as they are
PLAIN = ("n", "attacks", "complete", "seed", "batch_size", "same", "data", "versions", "notes", "probe_seconds")


def vacant(folder: str | os.PathLike[str]) -> None:
    """FileExistsError if the folder holds a result."""
    if (Path(folder) / RECORD).exists():
        raise FileExistsError(f"{folder} holds a result; choose another folder, or save(folder, overwrite=True)")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, bring it to the disk, and only then give it its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    fields = {"eps": f"{result.threat.eps:.6g}", "clean_acc": percent["natural"], "external": percent[KINDS[-1]]}
    return fields | ({"autoattack_acc": percent["true gradient"]} if result.complete else {})


def save(result: Result, folder: str | os.PathLike[str], overwrite: bool) -> None:
    if not overwrite:
        vacant(folder)
    save_file = need("safetensors.torch").save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for side in result.sides:
        tensors |= {f"{side.name}.index": side.broken, f"{side.name}.x": side.examples.contiguous()}
    _replace(folder / EXAMPLES, lambda path: save_file(tensors, path, {"format": str(FORMAT)}))
    record = {
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
                "rows": [asdict(row) for row in side.rows],
                "broken_by": side.broken_by.tolist(),
            }
            for side in result.sides
        ],
        "findings": [asdict(finding) for finding in result.findings],
        "examples_sha256": fingerprint.of_file(folder / EXAMPLES),
    }
    # last, so that a folder with a result.json has its examples
    content = json.dumps(record, indent=1) + "\n"
    _replace(folder / RECORD, lambda path: path.write_text(content, encoding="utf-8"))


def _side(record: dict[str, Any], tensors: dict[str, Tensor], n: int, shape: list[int]) -> Side:
    name = record["name"]
    side = Side(
        name,
        record["description"],
        record["fingerprint"],
        [Row(**row) for row in record["rows"]],
        torch.tensor(record["broken_by"], dtype=torch.int64),
        tensors[f"{name}.x"],
    )
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
    return side


def load(folder: str | os.PathLike[str]) -> Result:
    load_file = need("safetensors.torch").load_file
    folder = Path(folder)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise ValueError(f"{folder} is of format {found!r}, and this version reads {FORMAT}: evaluate anew")
    try:
        if fingerprint.of_file(folder / EXAMPLES) != record["examples_sha256"]:
            raise ValueError(f"{folder / EXAMPLES} is not the file that {RECORD} was written with")
        tensors = load_file(folder / EXAMPLES)
        n, shape = record["n"], record["data"]["x_shape"][1:]
        sides = {side["name"]: _side(side, tensors, n, shape) for side in record["sides"]}
        return Result(
            threat=Threat(**record["threat"]),
            model=sides["model"],
            base=sides.get("base"),
            findings=[Finding(**finding) for finding in record["findings"]],
            **{name: record[name] for name in PLAIN},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no complete result: {error!r}") from error


def verify(result: Result, model: nn.Module, x: Tensor, y: Tensor, base: nn.Module | None) -> None:
    """Check every example again: inside the ball and the box, and classified wrongly by its side.

    ValueError says how many fail. (An example on the boundary between two classes, to the last bit, may fall to the
    other side of it on other hardware or at another batch size.)
    """
    x, y = checks.inputs(x, y)
    if {"x_sha256": fingerprint.of_tensors([("x", x)]), "y_sha256": fingerprint.of_tensors([("y", y)])} != {
        name: result.data[name] for name in ("x_sha256", "y_sha256")
    }:
        raise ValueError("x and y are not the data of this result")
    for side, module in ((result.model, model), (result.base, base)):
        if side is None or module is None:
            continue
        broken = side.broken.to(x.device)
        with checks.borrowed(module, side.name):
            right = predict(module, side.examples, result.batch_size) == y[broken].cpu()
        astray = ~result.threat.allows(x[broken].cpu(), side.examples)
        if bool((right | astray).any()):
            raise ValueError(
                f"the {side.name}: of {len(broken)} examples {int(right.sum())} are classified rightly, and "
                f"{int(astray.sum())} lie outside the ball or the box"
            )
