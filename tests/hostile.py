"""Files as an attacker or a failing disk would leave them; run by test_hostile.py and benchmarks/reliability.py.

A case is a number: `attempt(target, number, folder)` makes the file anew from it.
"""

import copy
import hashlib
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from killed import step
from planted import Hidden, inputs, linear, straight_through
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_weights
from torch import nn

import forged_fx
from forged_fx import Stats, checkpoint, pictures, trials
from forged_fx.evaluate import Result, blocks, journal, probes
from forged_fx.evaluate.attacks import ATTACKS, Attack
from forged_fx.evaluate.journal import Journal
from forged_fx.search import Search
from forged_fx.sources.weights import load_weights, read_weights
from forged_fx.sweep import Sweep

MARKUP = "<script>alert(1)</script>"
ESCAPE = "\x1b]0;owned\x07\x1b[2J"
VALUES: list[Any] = [
    *(None, True, 0, 1, -1, 7, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf),
    *(
        "",
        "a",
        "0",
        "conv",
        "model",
        "../../etc/passwd",
        "/dev/zero",
        MARKUP,
        ESCAPE,
        "[/bold]",
        "\ud800",
        "\x00",
        "é" * 99,
    ),
    *([], {}, [None], [[]], {"a": 1}, [1, 2, 3], ["x"], [-1], [[1]], {"": {}}),
]
# what loading data has no business with
FORBIDDEN = ("exec", "compile", "import", "pickle.find_class", "os.system", "os.exec", "subprocess.Popen")
LATE = ("torch", "encodings", "numpy")  # what these have yet to import of themselves is theirs

_seen: list[str] | None = None


def _audit(event: str, args: tuple) -> None:
    if _seen is None:
        return
    if event == "import" and args[0].partition(".")[0] in LATE:
        return
    if event == "exec" and any(f"/{name}/" in args[0].co_filename for name in LATE):
        return
    if event in FORBIDDEN:
        _seen.append(f"{event} {args[:1]}")
    elif event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
        _seen.append(f"open {args[0]}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """What is run, imported or opened for writing within; a list that grows."""
    global _seen
    if not getattr(sys, "_hostile_hook", False):
        sys.addaudithook(_audit)
        sys._hostile_hook = True
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


def spoil(data: bytes, chance: random.Random) -> bytes:
    """Bytes with one to three faults."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at, size = chance.randrange(len(out) + 1), chance.choice((1, 1, 2, 8, 64, 512))
        match chance.randrange(7):
            case 0 if out:
                out[at % len(out)] ^= 1 << chance.randrange(8)
            case 1:
                out[at : at + size] = chance.randbytes(size)
            case 2:
                out[at:at] = chance.randbytes(size)
            case 3:
                del out[at : at + size]
            case 4:
                del out[at:]
            case 5:
                out[at:at] = out[: size * 8]
            case 6:
                out[at : at + 1] = chance.choice(
                    (b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"\xff", b"\0" * 8, b"NaN")
                )
    return bytes(out)


def alter(value: Any, chance: random.Random) -> Any:
    """JSON with one to three values replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        at, key = None, None
        node = value
        while isinstance(node, dict | list) and node and (at is None or chance.random() < 0.8):
            at, key = node, chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
            node = at[key]
        if at is None:
            return chance.choice(VALUES)
        match chance.randrange(4):
            case 0:
                del at[key]
            case 1 if isinstance(at, dict):
                at[str(chance.choice(VALUES))] = node
            case 1:
                at.append(node)
            case _:
                at[key] = chance.choice([*VALUES, *((node + 1, -node) if type(node) in (int, float) else ())])
    return value


def text(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def alter_array(array: np.ndarray, chance: random.Random) -> np.ndarray:
    array = array.copy()
    match chance.randrange(5):
        case 0:
            return array.astype(chance.choice((np.float32, np.float64, np.int64, np.int32, np.uint8, np.bool_)))
        case 1:
            return array.reshape(-1)[: chance.randint(0, array.size)]
        case 2:
            return np.stack([array, array])
        case 3:
            return array[None, ..., None]
        case _:
            if array.size:
                flat, i = array.reshape(-1), chance.randrange(array.size)
                odd = (np.nan, np.inf, -1.0) if array.dtype.kind == "f" else (not flat[i],)
                if array.dtype.kind in "iu":
                    odd = (-1, 2**62, np.iinfo(array.dtype).max, 1)
                flat[i] = chance.choice(odd)
            return array


def alter_tensors(path: Path, chance: random.Random) -> None:
    """A safetensors file with one array altered, removed, renamed or added; it stays one."""
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    key = chance.choice(sorted(arrays))
    match chance.randrange(6):
        case 0:
            del arrays[key]
        case 1:
            arrays["../x"] = arrays.pop(key)
        case 2:
            arrays["more"] = arrays[key]
        case _:
            arrays[key] = alter_array(arrays[key], chance)
    save_file(arrays, path, metadata)


@dataclass(frozen=True)
class Target:
    """make: writes the files into an empty folder. spoil: damages them. load: what is under test, on the folder. use:
    does all that can be done with what was loaded, and returns the name of an error that this may end with. load may
    raise nothing but `NAMED`, and runs nothing."""

    make: Callable[[Path], None]
    spoil: Callable[[Path, random.Random], None]
    load: Callable[[Path], Any]
    use: Callable[[Any, Path], str | None]


NAMED = (ValueError, FileNotFoundError, FileExistsError)


# ---- statistics


NET = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def _stats(folder: Path) -> None:
    x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    forged_fx.calibrate(NET, [x]).save(folder / "stats.safetensors")


def _spoil_stats(folder: Path, chance: random.Random, name: str = "stats.safetensors") -> None:
    path = folder / name
    match chance.randrange(3):
        case 0:
            data = path.read_bytes()
            head = 8 + int.from_bytes(
                data[:8], "little"
            )  # most of the file is counts: let half of the faults meet text
            cut = chance.choice((head, len(data)))
            path.write_bytes(spoil(data[:cut], chance) + data[cut:])
        case 1:
            with safe_open(path, "np") as file:
                header = json.loads(file.metadata()["forged_fx.stats"])
            save_file(load_file(path), path, {"forged_fx.stats": text(alter(header, chance)).decode(errors="replace")})
        case 2:
            alter_tensors(path, chance)


def _load_stats(folder: Path) -> Stats:
    return Stats.load(folder / "stats.safetensors")


def _use_stats(stats: Stats, folder: Path) -> None:
    assert repr(stats)
    for name, threshold in stats.thresholds(0.5).items():
        assert 0 <= threshold < math.inf and 0 <= stats.sites[name].share_zeroed(threshold) <= 1
    assert stats.merge(stats).merge(Stats()).batches == 2 * stats.batches
    stats.save(folder / "again.safetensors")
    assert Stats.load(folder / "again.safetensors") == stats
    try:
        forged = forged_fx.transform(NET, stats, 0.1)
    except ValueError as error:
        assert "another model" in str(error)
    else:
        assert torch.isfinite(forged(torch.ones(2, 1, 6, 6))).all() and str(forged_fx.describe(forged))


# ---- results


def _result(folder: Path) -> None:
    base, x = linear(classes=3), inputs(12)
    y = base(x).argmax(1)
    y[:2] = (y[:2] + 1) % 3
    bpda = straight_through
    forged_fx.evaluate(Hidden(base), base, x=x, y=y, eps=0.02, attacks="quick", bpda=bpda).save(folder / "run")


def _spoil_result(folder: Path, chance: random.Random) -> None:
    run = folder / "run"
    match chance.randrange(5):
        case 0:
            path = run / chance.choice(("result.json", "timing.json", "examples.safetensors"))
            path.write_bytes(spoil(path.read_bytes(), chance))
        case 1 | 2:
            path = run / chance.choice(("result.json", "result.json", "timing.json"))
            path.write_bytes(text(alter(json.loads(path.read_bytes()), chance)))
        case 3:
            alter_tensors(run / "examples.safetensors", chance)
        case 4:
            path = run / "examples.safetensors"
            path.write_bytes(spoil(path.read_bytes(), chance))
    if chance.random() < 0.8:  # an attacker knows the sum
        try:
            record = json.loads((run / "result.json").read_bytes())
            record["examples_sha256"] = hashlib.sha256((run / "examples.safetensors").read_bytes()).hexdigest()
            (run / "result.json").write_bytes(text(record))
        except (ValueError, TypeError, RecursionError):
            pass


def _load_result(folder: Path) -> Result:
    return Result.load(folder / "run")


def _use_result(result: Result, folder: Path) -> None:
    assert result.verdict and result.exit_code >= 0 and repr(result)
    shown = str(result) + str(forged_fx.compare(result, result))
    assert not any(c in shown for c in "\x1b\x07\x00")
    result.save(folder / "again")
    assert str(Result.load(folder / "again")) == str(result)


# ---- unfinished runs

CALL = {"threat": {"eps": 0.1, "norm": "Linf"}, "seed": 0, "plan": {"true": ["apgd-ce"]}, "command": ["x.py", "--y"]}
BLOCKS = {k: {"found": torch.arange(6) + k, "block": torch.arange(3)} for k in range(2)}


def _unfinished(folder: Path) -> None:
    with Journal(folder, CALL) as run:
        for number, block in BLOCKS.items():
            run.keep("base 1", number, journal.pack(block))
        run.log("began")


def _spoil_unfinished(folder: Path, chance: random.Random) -> None:
    blocks = sorted((folder / "unfinished").glob("*.safetensors"))
    match chance.randrange(5):
        case 0:
            path = chance.choice([*blocks, folder / "unfinished" / "call.json", folder / "log.txt"])
            path.write_bytes(spoil(path.read_bytes(), chance))
        case 1:
            path = folder / "unfinished" / "call.json"
            path.write_bytes(text(alter(json.loads(path.read_bytes()), chance)))
        case 2:
            alter_tensors(chance.choice(blocks), chance)
        case 3:
            path = chance.choice(blocks)
            path.write_bytes(spoil(path.read_bytes(), chance))
        case 4:
            path = chance.choice([*blocks, folder / "unfinished" / "call.json"])
            path.unlink()
            chance.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")))()


def _load_unfinished(folder: Path) -> dict[int, bytes]:
    with Journal(folder, CALL) as run:
        assert all(isinstance(part, str) for part in run.command)
        return run.recall("base 1", 2)


def _use_unfinished(found: dict[int, bytes], folder: Path) -> None:
    for number, data in found.items():  # what is taken is what was written; the rest is done anew
        assert data == journal.pack(BLOCKS[number])


# ---- unfinished scans

BATCHES = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(1)).split(3)


def _scan(folder: Path, batches: Iterable[torch.Tensor] = BATCHES) -> Stats:
    return forged_fx.calibrate(NET, batches, checkpoint=folder / "scan")


def _unfinished_scan(folder: Path) -> None:
    def stops() -> Iterator[torch.Tensor]:
        yield from BATCHES[:2]
        raise InterruptedError

    with suppress(InterruptedError):
        _scan(folder, stops())


def _load_scan(folder: Path) -> Path:
    checkpoint._read(folder / "scan")
    return folder


def _use_scan(where: Path, folder: Path) -> str | None:
    return _go_on(folder, lambda: _use_stats(_scan(folder), folder))


def _go_on(folder: Path, act: Callable[[], object]) -> str | None:
    """What is left to do; or the name of an error that says where."""
    try:
        act()
    except NAMED as error:
        said = " ".join([str(error), *getattr(error, "__notes__", [])])
        assert str(folder) in said and len(said) < 4000 and "\x1b" not in said, said
        return type(error).__name__
    return None


# ---- what sweep and search record, finished and not


@contextmanager
def _hurried() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(blocks, "BLOCK", 4))
        stack.enter_context(mock.patch.object(probes, "PROBED", 2))
        stack.enter_context(mock.patch.multiple(trials, STEPS=2, NEAR=4))
        stack.enter_context(mock.patch.dict(ATTACKS, step=Attack("step", step)))
        stack.enter_context(mock.patch.multiple(pictures, trade_off=mock.DEFAULT, trials=mock.DEFAULT))
        yield


def _sweep(folder: Path) -> Sweep:
    base, x = linear(classes=3), inputs(12)
    options = {"ratios": {"hard": [2**-6], "clamp": [0.7]}, "kinds": ("hard", "clamp"), "rounds": 0}
    options |= {"eps": 0.1, "attacks": ["step"], "folder": folder / "run", "progress": False}
    with _hurried():
        return forged_fx.sweep(base, [x], x, base(x).argmax(1), **options)


def _evaluate(folder: Path) -> Result:
    base, x = linear(classes=3), inputs(12)
    call = {"x": x, "y": base(x).argmax(1), "eps": 0.1, "attacks": ["step"], "bpda": straight_through}
    with _hurried(), mock.patch.multiple(probes, STEPS=(1, 2), RADII=(1.0,)):
        return forged_fx.evaluate(Hidden(base), base, **call, folder=folder / "run", progress=False)


def _search(folder: Path) -> Search:
    base, x = linear(classes=3), inputs(12)
    options = {"kinds": ("clamp",), "budget": 3, "finalists": 1, "max_natural_loss": 0.5}
    options |= {"eps": 0.1, "attacks": ["step"], "folder": folder / "run", "progress": False}
    with _hurried():
        return forged_fx.search(base, forged_fx.calibrate(base, [x]), x, base(x).argmax(1), **options)


def _spoil_record(name: str, folder: Path, chance: random.Random) -> None:
    path = folder / "run" / name
    if chance.random() < 0.4:
        path.write_bytes(spoil(path.read_bytes(), chance))
    else:
        path.write_bytes(text(alter(json.loads(path.read_bytes()), chance)))


def _use_record(found: Sweep | Search, folder: Path) -> None:
    assert not any(c in str(found) + repr(found) for c in "\x1b\x07\x00")
    found.save(folder / "again")
    again = type(found).load(folder / "again")
    assert str(again) == str(found) and again.records() == found.records()


def _stopped(work: Callable[[Path], object], after: int, folder: Path) -> None:
    """The work's folder, when so many blocks were done."""
    done, do = [], blocks.Blocks._do

    def stops(*args: Any) -> bytes:
        done.append(1)
        if len(done) > after:
            raise InterruptedError
        return do(*args)

    with mock.patch.object(blocks.Blocks, "_do", stops):
        try:
            work(folder)
        except InterruptedError as error:
            assert f"kept in {folder / 'run'}: the same call goes on" in " ".join(error.__notes__)


def _spoil_stopped(folder: Path, chance: random.Random) -> None:
    """As an attacker does, who knows the sum; or who does not, and so the block is done anew."""
    unfinished = folder / "run" / "unfinished"
    if chance.random() < 0.1:
        path = unfinished / "call.json"
        path.write_bytes(text(alter(json.loads(path.read_bytes()), chance)))
        return
    path = chance.choice(sorted(unfinished.glob("*.safetensors")))
    if chance.random() < 0.3:
        path.write_bytes(spoil(path.read_bytes(), chance))
        return
    alter_tensors(path, chance)
    path.write_bytes(journal.pack({key: torch.from_numpy(value) for key, value in load_file(path).items()}))


def _load_stopped(folder: Path) -> Path:
    return folder


# ---- weights


def _weights(folder: Path) -> None:
    torch.save(NET.state_dict(), folder / "weights.pt")
    torch.save({"state_dict": NET.state_dict(), "epoch": 3}, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_weights(NET.state_dict(), folder / "weights.safetensors")


def _spoil_weights(folder: Path, chance: random.Random) -> None:
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" and chance.random() < 0.5:
            alter_tensors(path, chance)
        else:
            path.write_bytes(spoil(path.read_bytes(), chance))
    chance.choice(sorted(folder.iterdir())).rename(folder / f"{chance.choice(('a.pt', 'a.safetensors'))}")


def _load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return read_weights(_file(folder))


def _file(folder: Path) -> Path:
    return next(folder.glob("a.*"), folder / "weights.pt")


def _use_weights(found: dict[str, torch.Tensor], folder: Path) -> None:
    net = copy.deepcopy(NET)
    try:
        load_weights(net, _file(folder))
    except ValueError as error:
        assert "another model" in str(error)
    assert [tuple(p.shape) for p in net.parameters()] == [tuple(p.shape) for p in NET.parameters()]


TARGETS = {
    "weights": Target(_weights, _spoil_weights, _load_weights, _use_weights),
    "statistics": Target(_stats, _spoil_stats, _load_stats, _use_stats),
    "result": Target(_result, _spoil_result, _load_result, _use_result),
    "unfinished run": Target(_unfinished, _spoil_unfinished, _load_unfinished, _use_unfinished),
    "unfinished scan": Target(_unfinished_scan, partial(_spoil_stats, name="scan"), _load_scan, _use_scan),
    **{
        name: Target(
            work,
            partial(_spoil_record, f"{name}.json"),
            lambda folder, kind=kind: kind.load(folder / "run"),
            _use_record,
        )
        for name, work, kind in (("sweep", _sweep, Sweep), ("search", _search, Search))
    },
    **{
        f"unfinished {name}": Target(
            partial(_stopped, work, after),
            _spoil_stopped,
            _load_stopped,
            lambda where, folder, work=work: _go_on(folder, lambda: str(work(folder))),
        )
        for name, work, after in (("evaluation", _evaluate, 8), ("sweep", _sweep, 20), ("search", _search, 20))
    },
}


def attempt(target: Target, sound: dict[Path, bytes], number: int, folder: Path) -> str:
    """ "taken" or the error's name. sound: the files by `snapshot`. AssertionError, or an error that is not `NAMED`."""
    for path, data in sound.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    target.spoil(folder, random.Random(number))
    with watched() as seen:
        try:
            loaded = target.load(folder)
        except NAMED as error:
            outcome = type(error).__name__
            assert str(folder) in str(error) and len(str(error)) < 4000 and "\x1b" not in str(error)
        else:
            outcome, loading = "taken", len(seen)
            outcome = target.use(loaded, folder) or outcome
            seen[loading:] = [what for what in seen[loading:] if what.startswith("open")]
    astray = [what for what in seen if not what.startswith(f"open {folder}")]
    assert not astray, astray
    return outcome


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
