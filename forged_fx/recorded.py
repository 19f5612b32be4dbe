"""Runs of `sweep` and `search`, and what they find, in a folder: written whole, and checked when it is read.

NAME.json    everything
NAME.csv     a row for the base and for each configuration
NAME.svg     a picture, where there is matplotlib
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from forged_fx import checked
from forged_fx.evaluate import checks, terminal
from forged_fx.evaluate.answers import same, summary
from forged_fx.evaluate.blocks import Blocks
from forged_fx.evaluate.journal import Call, Journal, agree, begin
from forged_fx.evaluate.threat import Threat
from forged_fx.extras import need
from forged_fx.files import whole
from forged_fx.pictures import Picture
from forged_fx.processes import Processes, joined
from forged_fx.randomness import seeded
from forged_fx.rows import Table, write_csv

FORMAT = 1
LIMIT = 1e9  # of figures that know no other


class Recorded:
    """A base of dataclasses that have `threat` and `facts`. NAME: of the files; BESIDE: others that a run ends with.
    FACTS: what facts must hold."""

    NAME: ClassVar[str]
    BESIDE: ClassVar[tuple[str, ...]] = ()
    threat: Threat
    facts: dict[str, Any]
    FACTS: ClassVar[dict[str, Any]] = {"call": dict[str, Any], "seed": int}

    @property
    def sentence(self) -> str:
        """What was found, in a sentence."""
        raise NotImplementedError

    @property
    def verdict(self) -> str:
        """The same in a few words."""
        raise NotImplementedError

    @property
    def small_print(self) -> str:
        """Under which conditions."""
        raise NotImplementedError

    def tables(self) -> list[Table]:
        """What a reader should see of the figures."""
        raise NotImplementedError

    def records(self) -> list[dict[str, Any]]:
        """A row for the base and for each configuration, as the CSV has them."""
        raise NotImplementedError

    def picture(self) -> Picture:
        """All configurations beside the base."""
        raise NotImplementedError

    def plot(self, path: str | os.PathLike[str]) -> None:
        """The picture as a file: SVG, PNG or PDF, by suffix."""
        self.picture().save(path)

    def check(self) -> None:
        """ValueError where figures cannot be."""
        checks.threat(self.threat.eps, self.threat.norm)
        for name, kind in self.FACTS.items():
            checked.fit(self.facts.get(name), kind, f"facts.{name}")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files, each whole or not at all. The record comes last: a folder that has it is complete."""
        folder, rows = Path(folder), self.records()
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / f"{self.NAME}.csv", list(rows[0]), rows)
        try:
            self.plot(folder / f"{self.NAME}.svg")
        except ImportError:  # the figures stand without it
            pass
        record = {"format": FORMAT, "sentence": self.sentence} | _plain(self)
        with whole(folder / f"{self.NAME}.json") as path:
            path.write_text(json.dumps(record, indent=1, default=_plain) + "\n", encoding="utf-8")

    def finish(self, folder: str | os.PathLike[str], journal: Journal) -> None:
        """It takes the unfinished run's place."""
        self.save(folder)
        journal.log(f"finished: {self.sentence}")
        journal.finish()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. ValueError for anything else."""
        checked.path(folder, f"{cls.__name__}.load")
        name = f"{cls.NAME}.json"
        if not (Path(folder) / name).exists():
            raise FileNotFoundError(f"{folder} holds no {name}: forged_fx.{cls.NAME}(..., folder=...) writes it")
        return cls.parse({name: checked.read(Path(folder) / name)}, str(folder))

    @classmethod
    def parse(cls, files: dict[str, bytes], where: str) -> Self:
        """What is in these files, of the folder of this name. ValueError for anything else."""
        name = f"{cls.NAME}.json"
        try:
            record = checked.fit(checked.parse(files[name]), dict[str, Any], "it")
            if record.pop("format", None) != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            record.pop("sentence", None)
            found = checked.build(cls, record, cls.NAME)
            found.check()
            return found
        except ValueError as error:
            raise ValueError(f"{Path(where) / name} holds no {cls.NAME}: {error}") from error

    def __rich__(self) -> Any:
        parts = (
            terminal.plain(self.sentence, "bold"),
            *map(terminal.table, self.tables()),
            terminal.plain(self.small_print),
        )
        return need("rich.console").Group(*parts)

    def __str__(self) -> str:
        return terminal.text(self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {checked.visible(self.sentence)}>"


@dataclass(frozen=True)
class Run:
    """One process's part in a run. journal: in process 0, where there is a folder. finished: what that holds already,
    in every process."""

    processes: Processes
    blocks: Blocks
    shown: terminal.Progress
    journal: Journal | None = None
    finished: Any = None

    def again(self, model: nn.Module, x: Tensor, batch_size: int) -> Any:
        """What is finished; ValueError if the model, though its state is the same, answers otherwise than it did."""
        before = checked.fit(self.finished.facts.get("logits"), list[float], "facts.logits")
        with checks.borrowed(model, "model"):
            now = _logits(model, x, batch_size)
        checks.same_code(same(before, now), "model", "the result in this folder was made")
        return self.finished


def answers(model: nn.Module, x: Tensor, batch_size: int) -> list[float]:
    """What a finished run keeps in its facts of the model's unattacked logits."""
    return summary(_logits(model, x, batch_size))


def facts(call: Call, logits: list[float], **more: Any) -> dict[str, Any]:
    """What a finished run says of itself. logits: `answers` of its model."""
    again = {"command": list(sys.argv), "seed": call["seed"], "threads": torch.get_num_threads()}
    return {"call": call, "logits": logits} | again | more


def versions() -> dict[str, str]:
    """Of what a run depends on; those of another are another call."""
    return {name: version(name) for name in ("forged_fx", "pyautoattack", "torch")}


def _logits(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    with seeded(0):  # a model may draw
        return checks.answers(model, x, batch_size, "model")


@contextmanager
def running(
    kind: type[Recorded],
    call: Call,
    model: nn.Module,
    *,
    seed: int,
    folder: str | os.PathLike[str] | None,
    progress: bool | None,
    shard: bool | None,
) -> Iterator[Run]:
    """A run of this kind, by all processes that share it. Raises as `joined` and `journal.begin` do."""
    if folder is not None:
        checked.folder(folder, kind.NAME)
    with ExitStack() as stack:
        processes = stack.enter_context(joined(shard, kind.NAME))
        agree(processes, call, {"the model": model}, folder="none" if folder is None else "given")
        blocks, shown = Blocks(seed, processes), terminal.Progress(progress if processes.rank == 0 else False)
        journal = finished = None
        if folder is not None:
            asked = call | {"command": list(sys.argv)}
            writes = (f"{kind.NAME}.csv", f"{kind.NAME}.svg", *kind.BESIDE)
            journal, finished = begin(folder, asked, processes, f"{kind.NAME}.json", kind.parse, writes=writes)
            if journal:
                blocks.journal, shown.log = stack.enter_context(journal), journal.log_once
        yield Run(processes, blocks, shown, journal, finished)


def _plain(value: Any) -> Any:
    """What JSON does not know."""
    if hasattr(value, "record"):
        return value.record()
    return {f.name: getattr(value, f.name) for f in fields(value)}


def within(name: str, figures: Iterable[float | None], least: float, most: float) -> None:
    """ValueError unless each figure that there is lies in [least, most], to rounding."""
    for figure in figures:
        if figure is not None and not least - 1e-9 <= figure <= most + 1e-9:
            raise ValueError(f"{name}: {figure!r} is not in [{least:g}, {most:g}]")
