"""Hostile files are data: a named error in bounded time and memory, and no code run."""

import ast
import dataclasses
import html.parser
import json
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from collections import Counter
from pathlib import Path

import hostile
import pytest
import torch
from hostile import ESCAPE, MARKUP, TARGETS
from torch import nn

import forged_fx
from forged_fx import Stats, report
from forged_fx.digits import one_thread
from forged_fx.evaluate import Result
from forged_fx.evaluate.journal import Journal
from forged_fx.files import whole
from forged_fx.sources.weights import read_weights

CASES = {"weights": 120, "statistics": 250, "result": 40, "unfinished run": 120, "unfinished scan": 60}
CASES |= {"sweep": 20, "search": 20, "unfinished evaluation": 20, "unfinished sweep": 5, "unfinished search": 10}


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The files of each target as they should be, and the folder that they were made in."""

    def made(name):
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        TARGETS[name].make(folder)
        return folder, hostile.snapshot(folder)

    with one_thread():
        return {name: made(name) for name in TARGETS}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", TARGETS)
def test_mutated_files_are_refused_or_do_no_harm(sound, tmp_path, name):
    target, (folder, files) = TARGETS[name], sound[name]
    target.use(target.load(folder), folder)
    outcomes = {hostile.attempt(target, files, k, tmp_path / str(k)) for k in range(CASES[name])}
    assert "taken" in outcomes and "ValueError" in outcomes  # the faults are neither all gross nor all harmless


def header(text: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + body


def tensor(dtype: str, shape: list[int], size: int, metadata: dict | None = None) -> bytes:
    entry = {"c_max": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    return header(json.dumps(entry | ({"__metadata__": metadata} if metadata else {})).encode(), b"\0" * size)


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def zipped(path: Path, inner: bytes) -> bytes:
    """What torch.save writes, but for its content."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", inner)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", bytes(2**24))  # 16 MB that take 16 KB
    return path.read_bytes()


EMPTY = {"format": 1, "sites": {}, "batches": 0, "contexts": [], "given": [], "modules": {}}
GROSS = {
    "an empty file": lambda folder: b"",
    "a header of 2**63 bytes": lambda folder: struct.pack("<Q", 2**63) + b"{}",
    "a header longer than the file": lambda folder: struct.pack("<Q", 2**26) + b"{}",
    "a header of nothing": lambda folder: header(b" " * 2**24),
    "a header nested 100,000 deep": lambda folder: header(b'{"a":' * 100_000),
    "a shape larger than any memory": lambda folder: tensor("I64", [2**40, 2**40], 8),
    "a shape that takes no memory": lambda folder: tensor("I64", [0, 2**62], 0),
    "a dtype that numpy lacks": lambda folder: tensor("F8_E4M3", [8], 8, {"forged_fx.stats": json.dumps(EMPTY)}),
    "text nested 100,000 deep": lambda folder: tensor("F32", [0], 0, {"forged_fx.stats": "[" * 100_000}),
    "a number of a million digits": lambda folder: tensor("F32", [0], 0, {"forged_fx.stats": "9" * 10**6}),
    "text of 40 MB": lambda folder: tensor("F32", [0], 0, {"forged_fx.stats": '"' + " " * 40_000_000 + '"'}),
    "a pickle": lambda folder: pickle.dumps(Bomb(folder / "ran")),
    "a zip": lambda folder: zipped(folder / "bomb.zip", pickle.dumps(Bomb(folder / "ran"))),
}


def refused(load, path: Path, words: str | None = None) -> None:
    """A ValueError that names the file, within two seconds and 600 MB."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with hostile.watched() as seen, pytest.raises(ValueError, match=words) as error:
        load(path)
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000
    assert str(path) in str(error.value) and len(str(error.value)) < 1000 and seen == []


@pytest.mark.parametrize("what", GROSS)
def test_statistics_that_are_none(tmp_path, what):
    (tmp_path / "stats").write_bytes(GROSS[what](tmp_path))
    refused(Stats.load, tmp_path / "stats", "is not a file of calibration statistics.*calibrate")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("what", ["a pickle", "a zip", "an empty file", "a header longer than the file"])
@pytest.mark.parametrize("file", ["result.json", "examples.safetensors", "timing.json"])
def test_results_that_are_none(sound, tmp_path, what, file):
    for path, data in sound["result"][1].items():
        (tmp_path / path.name).write_bytes(data)
    (tmp_path / file).write_bytes(GROSS[what](tmp_path))
    if file == "timing.json":  # a result stands without it
        assert "timing.json is damaged" in Result.load(tmp_path).notes[-1]
    else:
        refused(Result.load, tmp_path, "holds no complete result.*evaluate anew")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("archive", [False, True])
def test_a_pickle_is_refused_in_no_time_however_long_its_names(tmp_path, archive):
    """torch searches what it says of it by expressions that take the square of its length."""
    data, path = b"\x80\x02c" + b"a" * 300_000 + b"\nb\n.", tmp_path / "weights.pt"
    path.write_bytes(data)
    if archive:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("weights/data.pkl", data)
            file.writestr("weights/version", "3")
    refused(read_weights, path, "cannot be read as weights alone")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what", ["a pickle", "a zip", "a header of 2**63 bytes", "a shape larger than any memory"])
@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_weights_that_are_none(tmp_path, what, file):
    (tmp_path / file).write_bytes(GROSS[what](tmp_path))
    refused(read_weights, tmp_path / file, "cannot be read as weights alone.*save model.state_dict")
    assert not (tmp_path / "ran").exists()


def test_weights_that_unpack_to_more_than_they_have(tmp_path):
    sound = {"0": torch.zeros(2**20)}
    torch.save(sound, tmp_path / "sound.pt")
    with zipfile.ZipFile(tmp_path / "sound.pt") as old, zipfile.ZipFile(tmp_path / "packed.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "packed.pt").stat().st_size < 10_000 and read_weights(tmp_path / "sound.pt")
    refused(read_weights, tmp_path / "packed.pt", "compressed or overlap")


def place(path: Path, what: str) -> None:
    path.unlink(missing_ok=True)
    match what:
        case "a pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
        case "a device":
            path.symlink_to("/dev/zero")
        case "a terabyte of nothing":
            with open(path, "wb") as file:
                file.truncate(2**40)


@pytest.mark.parametrize("what", ["a pipe", "a folder", "a device", "a terabyte of nothing"])
def test_files_that_are_none(sound, tmp_path, what):
    place(tmp_path / "stats", what)
    refused(Stats.load, tmp_path / "stats")
    for file in ("result.json", "examples.safetensors", "timing.json"):
        run = tmp_path / file
        run.mkdir()
        for path, data in sound["result"][1].items():
            (run / path.name).write_bytes(data)
        place(run / file, what)
        refused(Result.load, run, "is not a regular file|bytes, and at most")


def test_a_folder_full_of_links_leads_nowhere(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    folder.mkdir()
    part = folder / f".x.{os.getpid()}.part"
    for link in (part, folder / "log.txt"):
        link.symlink_to(victim)
    with whole(folder / "x") as path:
        path.write_text("theirs")
    with pytest.raises(OSError), Journal(folder, {"command": []}) as journal:
        journal.log("theirs")
    assert victim.read_text() == "mine" and (folder / "x").read_text() == "theirs"


class Tags(html.parser.HTMLParser):
    """Counts elements and their attributes, those of pictures apart."""

    def __init__(self):
        super().__init__()
        self.found, self.drawing = Counter(), 0

    def handle_starttag(self, tag, attrs):
        self.drawing += tag == "svg"
        if not self.drawing or tag in ("script", "a", "image", "foreignobject"):
            self.found.update([(tag, None), *((tag, name) for name, _ in attrs)])

    def handle_endtag(self, tag):
        self.drawing -= tag == "svg"


def tags(page):
    parser = Tags()
    parser.feed(page)
    return parser.found


class Odd(nn.Module):
    """Layers whose names mean something to HTML, to a terminal, to Python or to a file system."""

    NAMES = (MARKUP, ESCAPE, "'\"><img src=x onerror=alert(1)>", '") or print("ran', "\\", "../../x", "a:b", "c#d", "é")

    def __init__(self):
        super().__init__()
        self.names = [name.replace(".", "_") for name in self.NAMES]  # a module's name has no dot
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in self.names})

    def forward(self, x):
        for name in self.names:
            x = self.layers[name](x).relu() + x
        return x


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_text_everywhere(sound, tmp_path, capsys):
    net, x = Odd(), torch.randn(8, 4)
    stats = forged_fx.calibrate(net, [x])
    stats.save(tmp_path / "stats.safetensors")
    assert Stats.load(tmp_path / "stats.safetensors") == stats
    assert [name.removeprefix("layers.") for name in stats.sites] == net.names
    forged = forged_fx.transform(net, stats, 0)
    assert torch.equal(forged(x), net(x)) and capsys.readouterr().out == ""
    sites = forged_fx.describe(forged)
    assert len(sites) == len(net.names) and "\x1b" not in str(sites)
    result = Result.load(sound["result"][0] / "run")
    for row in result.rows:
        row.note = row.attack = MARKUP + ESCAPE + "[/bold][red]"
    result.notes.append(row.note)
    assert MARKUP in str(result) and "[/bold][red]" in str(result) and "\x1b" not in str(result)
    pages = []
    for text, rows in ((MARKUP, sites), ("plain", _renamed(sites))):
        zeros = {row.site: 0.1 for row in rows}
        run = report.Run(text, result, about=text, sites=rows, zeros=zeros, facts={text: text})
        pages.append(report.page(run))
    odd, plain = map(tags, pages)
    assert odd == plain  # what a name says makes no element and no attribute
    assert not any((name or "").startswith("on") for _, name in odd) and "<img src=x" not in pages[0]
    assert "Content-Security-Policy" in pages[0]


def _renamed(sites):
    rows = type(sites)()
    rows.notes = sites.notes
    rows.extend(dataclasses.replace(row, site=f"layer{i}") for i, row in enumerate(sites))
    return rows


@pytest.mark.parametrize("name", ["a:1", "b#2"])
def test_a_module_named_like_a_call_is_an_error(name):
    net = nn.Sequential()
    net.add_module(name, nn.Linear(4, 4))
    with pytest.raises(ValueError, match=f"{name}' is named like the call of another one"):
        forged_fx.calibrate(net, [torch.ones(2, 4)])


RUNS = {"eval", "exec", "compile", "__import__"}
UNPICKLES = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


def faults(source: str) -> list[str]:
    """Calls that would run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        owner, _, leaf = name.rpartition(".")
        safe = name == "torch.load" and given.get("weights_only") == "True"
        if (
            (not owner and leaf in RUNS)
            or (owner in UNPICKLES and leaf in ("load", "loads", "Unpickler", "open"))
            or (name in ("torch.load", "torch.jit.load", "torch.hub.load") and not safe)
            or given.get("allow_pickle") == "True"
            or given.get("shell") == "True"
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_no_code_runs_what_a_file_holds():
    root = Path(forged_fx.__file__).parents[1]
    code = [path for folder in ("forged_fx", "kernels", "benchmarks") for path in sorted((root / folder).rglob("*.py"))]
    assert len(code) > 60
    assert {str(path.relative_to(root)): found for path in code if (found := faults(path.read_text()))} == {}
    for bad in (
        "eval(x)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.loads(x)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
    ):
        assert faults(bad)
    assert not faults("model.eval(); torch.load(f, weights_only=True); re.compile(x); torch.compile(m)")


def test_the_mutations_are_the_same_each_time():
    data = bytes(range(256))
    assert hostile.spoil(data, random.Random(3)) == hostile.spoil(data, random.Random(3)) != data
