"""The terminal: every command's example runs, and errors, interruptions and exit codes are what they are said to be."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import vit_in_a_folder
from safetensors.torch import save_file

import forged_fx
from forged_fx import demo, digits
from forged_fx.cli import given, main, options, output, understood
from forged_fx.cli.main import COMMANDS, EXIT_NOTE
from forged_fx.evaluate.verdict import EXIT_CODES
from forged_fx.files import PROGRAM, STATISTICS, WEIGHTS
from forged_fx.lipschitz import Lipschitz
from forged_fx.sparsity import Sparsity

MODEL = ["forged_fx.digits:cnn", "--weights", "demo/model.safetensors", "--data", "digits"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `forged-fx demo` leaves, made quick: of an untrained network, for which the attacks have little to do."""
    folder = tmp_path_factory.mktemp("cli")
    with digits.one_thread():
        torch.manual_seed(0)
        model = digits.cnn().eval()
        x_train, _, x, y = digits.load()
        stats = forged_fx.calibrate(model, x_train.split(256))
        forged = forged_fx.transform(model, stats, 2**-7)
        result = forged_fx.evaluate(forged, model, x=x[:8], y=y[:8], eps=digits.EPS, attacks=["apgd-ce"])
    result.save(folder / "demo")
    stats.save(folder / "demo" / "stats.safetensors")
    save_file(model.state_dict(), folder / "demo" / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    """Every command runs there, on one thread."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(demo, "run", lambda out, seed, n: print(f"{out} {seed} {n}"))
    with digits.one_thread():
        yield


def one_line(capsys):
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("forged-fx: ")
    return err


def example(name):
    return import_module(f"forged_fx.cli.{name}").EXAMPLE


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_example_runs(name, capsys):
    program, *arguments = shlex.split(example(name))
    assert program == "forged-fx" and arguments[0] == name
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 0 or (name in ("evaluate", "compare", "search") and code in EXIT_CODES.values()), err
    assert out and err == ""  # no terminal, no progress


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_example_and_asks_for_no_torch(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([name, "--help"]) == 0
    words = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    assert re.sub(r"\s+", "", example(name)) in words


def test_help_imports_no_torch():
    code = "import sys\nfrom forged_fx.cli import main\nmain(['--help'])\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "calibrate" in done.stdout and "Exit codes" in done.stdout


def test_describe_says_what_its_two_shares_are(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["describe", "--help"]) == 0
    words = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    assert "net_zeroed:whatforgingzeroes" in words and "share_zeroed:whatis0behind" in words


def test_exit_codes_are_those_of_verdicts():
    for verdict, code in EXIT_CODES.items():
        assert f"{code} {verdict}" in EXIT_NOTE


JSON = {
    "calibrate": [*MODEL, "--out", "other.safetensors", "--limit", "100"],
    "describe": [*MODEL, "--stats", "demo/stats.safetensors", "--exclude", "7"],
    "compare": ["demo", "demo"],
    "bench": [*MODEL, "--stats", "demo/stats.safetensors", "--modes", "eager", "--rounds", "1", "--batch", "1"],
    "transform": [*MODEL, "--stats", "demo/stats.safetensors", "--out", "forged.safetensors"],
    "sparsity": [*MODEL, "--stats", "demo/stats.safetensors", "--limit", "9", "--save", "sparsity.csv"],
}


@pytest.mark.parametrize("name", JSON)
def test_json_is_all_that_is_printed(name, capsys):
    main([name, *JSON[name], "--json"])
    out, err = capsys.readouterr()
    assert isinstance(json.loads(out), dict) and err == ""


STATS = ["--stats", "kept/stats.safetensors"]
KEPT = [MODEL[0], "--weights", "kept/w.safetensors", "--data", "digits"]
LOST = {  # command line -> which file it would write over, and what is said of it
    "its weights": (["calibrate", *KEPT, "--out", "kept/w.safetensors"], "--out .* is what --weights kept/w.* reads"),
    "its weights, by a link": (["calibrate", *KEPT, "--out", "kept/link"], "--out kept/link is what --weights kept/w"),
    "its images": (["calibrate", KEPT[0], "--data", "npz:kept/x.npz", "--out", "kept/x.npz"], "what --data npz:kept/x"),
    "its model": (["calibrate", "kept/m.pt2", "--data", "digits", "--out", "kept/m.pt2"], "is what MODEL kept/m.pt2"),
    "other weights": (["calibrate", *KEPT, "--out", "kept/v.safetensors"], "kept/v.* is no file of calibration stat"),
    "other figures": (["calibrate", *KEPT, "--out", "kept/t.json"], "is no file of calibration statistics"),
    "weights of transform": (["transform", *KEPT, *STATS, "--out", "kept/w.safetensors"], "is what --weights"),
    "statistics of transform": (["transform", *KEPT, *STATS, "--out", "kept/stats.safetensors"], "is what --stats"),
    "other statistics": (["transform", *KEPT, *STATS, "--out", "kept/s.safetensors"], "no file of a forged model's"),
    "a plain program": (["transform", *KEPT, *STATS, "--out", "kept/m.pt2"], "no program of a forged model"),
    "somebody's table": (["sparsity", *KEPT, *STATS, "--save", "kept/t.csv"], "no table of these figures"),
    "somebody's figures": (["sparsity", *KEPT, *STATS, "--save", "kept/t.json"], "no file of forged_fx's figures"),
    "somebody's picture": (["lipschitz", *KEPT, *STATS, "--save", "kept/t.svg"], "no picture that Matplotlib drew"),
    "no picture that says who drew it": (
        ["sparsity", *KEPT, *STATS, "--save", "a.jpg"],
        "has to end with .json, .csv,",
    ),
    "somebody's page": (["report", "demo", "--out", "kept/t.html"], "no report of forged_fx"),
    "its folder of images": (
        ["sweep", KEPT[0], "--data", "imagefolder:kept", "--folder", "kept", "--eps", "0.1"],
        "--folder kept is what --data imagefolder:kept reads",
    ),
}


@pytest.fixture
def kept(folder):
    """Files of the caller's; they stay as they are."""
    (there := folder / "kept").mkdir()
    shutil.copy("demo/stats.safetensors", there)
    shutil.copy("demo/stats.safetensors", there / "s.safetensors")
    for name in ("w.safetensors", "v.safetensors"):
        shutil.copy("demo/model.safetensors", there / name)
    (there / "link").symlink_to("w.safetensors")
    np.savez(there / "x.npz", x=np.zeros((2, 8, 8), np.uint8), y=np.zeros(2, np.int64))
    for name in ("m.pt2", "t.csv", "t.json", "t.svg", "t.html"):
        (there / name).write_text("mine, mine", encoding="utf-8")
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    yield
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before
    shutil.rmtree(there)


@pytest.mark.parametrize("case", LOST)
def test_what_a_command_reads_and_what_is_not_ours_is_not_written_over(case, kept, capsys):
    arguments, words = LOST[case]
    assert main(arguments) in (1, 2)
    assert re.search(words, one_line(capsys))


def test_what_is_ours_is_written_over(tmp_path, capsys):
    """By the same command again."""
    of_stats = [*MODEL, "--stats", "demo/stats.safetensors"]
    shutil.copytree("demo", tmp_path / "run")
    commands = [["calibrate", *MODEL, "--out", f"{tmp_path}/s", "--limit", "9"]]
    commands += [["transform", *of_stats, "--out", f"{tmp_path}/f{end}"] for end in (".safetensors", ".pt2", ".onnx")]
    counted = ["sparsity", *of_stats, "--limit", "9"]
    commands += [[*counted, "--save", f"{tmp_path}/t{end}"] for end in (".csv", ".json", ".svg", ".png", ".pdf")]
    commands += [[*counted, "--folder", f"{tmp_path}/run"], ["report", f"{tmp_path}/run"]]
    for command in commands * 2:
        assert main(command) == 0, capsys.readouterr().err


def test_a_page_shows_what_was_measured_into_its_folder(capsys, tmp_path):
    shutil.copytree("demo", tmp_path / "run")
    for command in (["sparsity", "--limit", "9"], ["lipschitz", "--limit", "2", "--steps", "1"]):
        arguments = [*MODEL, "--stats", "demo/stats.safetensors", *command[1:], "--folder", str(tmp_path / "run")]
        assert main([command[0], *arguments]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Share zeroed by site, measured" in page and "Gain by site" in page
    assert page.count("another forging than the model judged above") == 4  # judged was 2**-7, and these are the default
    for command in (["sparsity", "--limit", "9"], ["lipschitz", "--limit", "2", "--steps", "1"]):
        arguments = [*MODEL, "--stats", "demo/stats.safetensors", *command[1:], "--folder", str(tmp_path / "run")]
        assert main([command[0], *arguments, "--ratio", "2**-7"]) == 0
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "another forging" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_folder_is_of_one_kind(capsys, tmp_path):
    """At the same thresholds too; and what lies beside the other's result stays."""
    run = [*MODEL, "--stats", "demo/stats.safetensors", "--eps", "0.15", "--limit", "8", "--attacks", "apgd-ce"]
    run = ["evaluate", *run, "--folder", str(tmp_path / "run"), "--kind"]
    assert main([*run, "soft"]) in EXIT_CODES.values()
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    assert main([*run, "hard"]) == 1
    assert "model.forging: soft at 4 sites, 0 to 7 (sum" in one_line(capsys)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("command", ["sparsity", "lipschitz", "bench"])
def test_an_empty_name_is_no_runs_folder(command, capsys):
    assert main([command, *MODEL, "--stats", "demo/stats.safetensors", "--folder", ""]) == 2
    assert "it names no folder" in one_line(capsys)


@pytest.mark.parametrize("command", ["sparsity", "lipschitz", "bench"])
def test_figures_are_put_beside_a_run_that_is_there(command, capsys, tmp_path):
    assert main([command, *MODEL, "--stats", "demo/stats.safetensors", "--folder", f"{tmp_path}/runn"]) == 2
    assert "there is no such folder" in one_line(capsys) and not (tmp_path / "runn").exists()


@pytest.mark.parametrize("command", ["sparsity", "lipschitz"])
@pytest.mark.parametrize("where", ["a file", "/proc/nowhere"])
def test_where_no_file_can_be_made_is_said_ahead_of_all_work(command, where, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(given, "model", None)
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("mine")
    assert main([command, *MODEL, "--stats", "s", "--save", f"{where}/rows.csv"]) == 1
    assert "no file can be made in" in one_line(capsys)


def test_what_was_measured_is_printed_even_if_it_cannot_be_kept(capsys, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(Sparsity, "save", fail)
    command = ["sparsity", *MODEL, "--stats", "demo/stats.safetensors", "--limit", "9"]
    assert main([*command, "--save", f"{tmp_path}/rows.csv"]) == 1
    out, err = capsys.readouterr()
    assert "zero before" in out and "no space left" in err


def test_a_warning_is_one_line(capsys):
    before = warnings.formatwarning
    said = []
    main_of = lambda: said.append(warnings.formatwarning("two\nlines", UserWarning, "file.py", 3))  # noqa: E731
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules["forged_fx.cli.main"], "app", lambda **_: main_of())
        assert main([]) == 0
    assert said == ["forged-fx: UserWarning: two lines\n"] and warnings.formatwarning is before


def test_an_empty_folder_name_is_not_the_working_directory(capsys):
    command = ["evaluate", "forged_fx.digits:cnn", "--weights", "random", "--data", "digits", "--eps", "0.15"]
    assert main([*command, "--limit", "6", "--attacks", "apgd-ce", "--folder", ""]) == 2
    assert "--folder" in one_line(capsys)


def test_describe_says_what_the_library_says(capsys):
    main(["describe", *JSON["describe"], "--ratio", "0=0,*=1/64", "--json"])
    rows = {row["site"]: row for row in json.loads(capsys.readouterr().out)["sites"]}
    stats = forged_fx.Stats.load("demo/stats.safetensors")
    assert rows["0"]["threshold"] == 0 and rows["5"]["threshold"] == stats.thresholds(1 / 64)["5"]
    assert rows["7"]["left_out"] == "in exclude"


def test_describe_without_images_says_once_that_nothing_was_audited(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main(["describe", *MODEL[:3], "--stats", "demo/stats.safetensors", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["notes"] == ["one graph; not audited: there was no batch to run it on"]
    assert document["elsewhere"] == []


def test_a_sites_own_name_counts_before_a_glob_and_help_says_so(capsys, monkeypatch):
    arguments = ["describe", *MODEL, "--stats", "demo/stats.safetensors", "--ratio", "*=1/64,0=off", "--json"]
    assert main(arguments) == 0
    rows = {row["site"]: row for row in json.loads(capsys.readouterr().out)["sites"]}
    assert rows["0"]["threshold"] == 0 < rows["5"]["threshold"]
    monkeypatch.setenv("COLUMNS", "100")
    main(["describe", "--help"])
    words = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    assert "'7=0,*=2**-6'" in words and "asite'sownnamecountsfirst,thenthefirstglobthatmatches" in words


def test_a_program_that_transform_wrote_is_a_model_like_any_other(capsys):
    assert main(["transform", *MODEL, "--stats", "demo/stats.safetensors", "--out", "forged.pt2"]) == 0
    found = given.model("forged.pt2", None, None, "cpu")
    plain = given.model(MODEL[0], MODEL[2], None, "cpu")
    forged = forged_fx.transform(plain.module, "demo/stats.safetensors", 2**-6)
    x = digits.load()[2][:5]
    assert torch.equal(found.module(x), forged(x))
    gradients = []
    for model in (found.module, forged):
        with forged_fx.straight_through():
            leaf = x.clone().requires_grad_()
            gradients += torch.autograd.grad(model(leaf).sum(), leaf)
    assert torch.equal(*gradients)


def test_a_program_of_hugging_faces_gives_logits_where_transformers_is_not_known(capsys, tmp_path):
    vit_in_a_folder(tmp_path)
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "x.npz", x=x, y=np.zeros(4, int))
    data, model = ["--data", f"npz:{tmp_path}/x.npz"], f"hf:{tmp_path}"
    assert main(["calibrate", model, *data, "--out", f"{tmp_path}/s"]) == 0
    assert main(["transform", model, *data, "--stats", f"{tmp_path}/s", "--out", f"{tmp_path}/f.pt2"]) == 0
    plain = given.model(model, None, None, "cpu")
    forged = plain.classifier(forged_fx.transform(plain.module, f"{tmp_path}/s", 2**-6))
    images = torch.from_numpy(x).float() / 255
    torch.save((images, forged(images).detach()), tmp_path / "expected")
    code = (
        "import sys, torch\nfrom forged_fx.sources import load_model\n"
        "x, y = torch.load(sys.argv[2])\n"
        "model = load_model(sys.argv[1], normalize='half')\n"
        "assert torch.allclose(model.classifier()(x), y, atol=1e-5) and 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", code, f"{tmp_path}/f.pt2", f"{tmp_path}/expected"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_plain_program_is_not_written_over_for_what_its_code_is_called(tmp_path):
    (tmp_path / "a.pt2").write_bytes(b'File "/home/me/forged_fx_experiments/net.py", line 3')
    with pytest.raises(FileExistsError, match="is no program of a forged model"):
        PROGRAM.check(tmp_path / "a.pt2")


LATE = {
    "sites.json": ["evaluate", *MODEL, "--stats", "demo/stats.safetensors", "--eps", "0.15", "--attacks", "apgd-ce"],
    "speeds.json": ["bench", *MODEL, "--stats", "demo/stats.safetensors", "--modes", "eager", "--rounds", "1"],
}


@pytest.mark.parametrize("name", LATE)
def test_what_a_folder_cannot_take_is_said_ahead_of_all_work(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(given, "model", None)
    (tmp_path / name).write_text("mine")
    assert main([*LATE[name], "--folder", str(tmp_path)]) == 1
    assert f"{name} is there already, and is no file of forged_fx's figures" in one_line(capsys)


def test_fewer_images_than_a_batch_are_not_timed_in_its_name(tmp_path, capsys):
    np.savez(tmp_path / "few.npz", x=digits.load()[2][:3].numpy())
    command = ["bench", *MODEL[:3], "--data", f"npz:{tmp_path}/few.npz", "--stats", "demo/stats.safetensors"]
    assert main(command) == 2
    assert "--batch 8: npz:" in (said := one_line(capsys)) and "has 3 images" in said


def test_small_changes_need_no_labels(tmp_path, capsys):
    np.savez(tmp_path / "few.npz", x=digits.load()[2][:2].numpy())
    command = ["lipschitz", *MODEL[:3], "--data", f"npz:{tmp_path}/few.npz", "--stats", "demo/stats.safetensors"]
    assert main([*command, "--steps", "1", "--eps", "0.1"]) == 0


def test_transform_writes_weights_and_thresholds(capsys):
    from safetensors.torch import load_file

    assert main(["transform", *MODEL, "--stats", "demo/stats.safetensors", "--out", "forged.safetensors"]) == 0
    assert "0.forged_threshold" in load_file("forged.safetensors")


def test_transform_says_at_which_ratio_and_counts_no_site_that_is_left_as_it_was(capsys):
    command = ["transform", *MODEL, "--stats", "demo/stats.safetensors", "--out", "forged.safetensors", "--ratio"]
    for ratio, said in {
        "2**-7": "at ratio 1/128: 4 of 4 sites forged, kind hard",
        "7=0,*=2**-7": "at ratio 1/128: 3 of 4 sites forged, 1 left at ratio 0, kind hard",
        "7=0.5,*=2**-7": "at ratios of their own: 4 of 4 sites forged, kind hard",
    }.items():
        assert main([*command, ratio]) == 0
        assert capsys.readouterr().out == f"forged.safetensors: {said}\n"


@pytest.mark.parametrize("limit", [["--limit", "2000"], ["--limit", "20"], []])
def test_fewer_images_than_asked_for_are_told_of(limit, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(given, "model", lambda *_: 1 / 0)  # enough
    assert main(["calibrate", *MODEL, *limit]) == 1
    said = "digits has 1597 images, fewer than the 2000 asked for: all are taken\n"
    assert (said in capsys.readouterr().err) == ("2000" in limit)


@pytest.mark.parametrize("command", ["transform", "evaluate"])
def test_module_by_module_on_request(command, monkeypatch, tmp_path, capsys):
    made, transform = [], forged_fx.transform
    monkeypatch.setattr(forged_fx, "transform", lambda *args, **more: made.append(transform(*args, **more)) or made[-1])
    arguments = {"transform": [*JSON["transform"][:-1], str(tmp_path / "f.safetensors")], "evaluate": EVALUATE[1:]}
    for more in ([], ["--no-graph"]):
        main([command, *arguments[command], *more, *(["--stats", "demo/stats.safetensors"] * (command == "evaluate"))])
    assert [isinstance(forged, torch.fx.GraphModule) for forged in made] == [True, False]


def test_other_kinds_and_what_they_take(capsys):
    arguments = ["describe", *MODEL, "--stats", "demo/stats.safetensors", "--json"]
    assert main([*arguments, "--kind", "0=band,*=clamp", "--ratio", "0=2**-6:0.5,7=off,*=0.5"]) == 0
    rows = {row["site"]: row for row in json.loads(capsys.readouterr().out)["sites"]}
    largest = forged_fx.Stats.load("demo/stats.safetensors").sites["0"].c_max
    assert (rows["0"]["threshold"], rows["0"]["limit"]) == (2**-6 * largest, 0.5 * largest)
    assert rows["5"]["forging"] == "clamp" and rows["7"]["limit"] is None
    assert main(["calibrate", *MODEL, "--where", "activations", "--channels", "--out", "mean.safetensors"]) == 0
    capsys.readouterr()
    arguments[arguments.index("demo/stats.safetensors")] = "mean.safetensors"
    assert main([*arguments, "--kind", "mean", "--where", "activations", "--ratio", "0.2"]) == 0
    rows = json.loads(capsys.readouterr().out)["sites"]
    assert [row["site"] for row in rows if row["width"] is not None] == ["1@0", "3@0", "6@0"]


EVALUATE = ["evaluate", *MODEL, "--eps", "0.1", "--limit", "2", "--attacks", "apgd-ce"]
ERRORS = {
    "no such model": (2, ["calibrate", "nothing", "--data", "digits"], "write one of timm:NAME"),
    "no such file": (1, ["describe", MODEL[0], "--stats", "gone.safetensors"], "gone.safetensors"),
    "no such data": (2, ["calibrate", MODEL[0], "--data", "digit"], "did you mean digits? Else write one of"),
    "no run": (1, ["compare", "gone", "demo"], "gone"),
    "no command": (2, ["forge"], "forge"),
    "no option": (2, ["calibrate", MODEL[0], "--dato", "digits"], "(forged-fx calibrate --help)"),
    "no number": (2, ["describe", MODEL[0], "--stats", "demo/stats.safetensors", "--ratio", "x"], "1/64 or 2**-6"),
    "no ratio": (2, ["describe", MODEL[0], "--stats", "demo/stats.safetensors", "--ratio", "2"], "[0, 1]"),
    "no site": (1, ["describe", *MODEL, "--stats", "demo/stats.safetensors", "--include", "8"], "matches no site"),
    "no eps": (2, ["evaluate", *MODEL], "--eps"),
    "a ratio of nothing": (2, [*EVALUATE, "--ratio", "0.5"], "--ratio says how to forge, and"),
    "no graph of nothing": (2, [*EVALUATE, "--no-graph"], "--graph says how to forge"),
    "a kind, as it would be": (2, [*EVALUATE, "--kind", "hard"], "--kind says how to forge"),
    "sites of nothing": (2, [*EVALUATE, "--include", "7"], "--include says how to forge"),
    "no sites of nothing": (2, [*EVALUATE, "--exclude", "7"], "--exclude says how to forge"),
    "where of nothing": (2, [*EVALUATE, "--where", "activations"], "needs --stats, the file"),
    "a statistic of nothing": (2, [*EVALUATE, "--statistic", "max"], "needs --stats, the file"),
    "weights of no base": (2, [*EVALUATE, "--base-weights", "random"], "needs --base, which"),
    "form of no base": (2, [*EVALUATE, "--base-normalize", "half"], "--base-normalize is of"),
    "the size of no images": (
        2,
        ["describe", MODEL[0], "--stats", "demo/stats.safetensors", "--resize", "8"],
        "--resize is of images, and needs --data",
    ),
    "another size": (
        1,
        ["calibrate", *MODEL, "--resize", "16"],
        "(calibrate was at batch 0 (counted from 0), of shape (",
    ),
    "another size than that of statistics": (
        1,
        ["describe", *MODEL, "--stats", "demo/stats.safetensors", "--resize", "16"],
        "of shape (2, 1, 16, 16), torch.float32: is that the size that the model takes (on a terminal, --resize SIDE)",
    ),
    "no device": (1, ["calibrate", *MODEL, "--device", "cuda:77"], "--device cuda:77"),
    "no ending": (2, ["transform", *MODEL, "--stats", "demo/stats.safetensors", "--out", "forged"], ".pt2, .onnx"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_one_line_and_a_code(case, capsys):
    code, arguments, words = ERRORS[case]
    assert main(arguments) == code
    assert words in one_line(capsys)


FORGING = ["describe", MODEL[0], "--stats", "demo/stats.safetensors"]
TRADE = ["sweep", *MODEL, "--eps", "0.1"]
NOT_UNDERSTOOD = {
    "norm": ([*EVALUATE, "--norm", "Linf2"], "norm='Linf2': choose one of Linf, L2, L1"),
    "ratio": ([*FORGING, "--ratio", "2"], "ratio must be a number in [0, 1]"),
    "a site's ratio": ([*FORGING, "--ratio", "7=2,*=0.5"], "ratio must be a number in [0, 1]"),
    "kind": ([*FORGING, "--kind", "hart"], "there is no kind 'hart'; did you mean 'hard'?"),
    "a site's kind": ([*FORGING, "--kind", "7=hart,*=hard"], "did you mean 'hard'?"),
    "statistic": ([*FORGING, "--statistic", "median"], "it is 'max', or 'quantile(q)'"),
    "attacks": ([*EVALUATE, "--attacks", "quik"], "choose 'quick' or"),
    "data": ([*EVALUATE[:-6], "--data", "digitz", "--eps", "0.1"], "did you mean digits?"),
    "split": ([*EVALUATE, "--split", "val"], "choose one of train, test"),
    "resize": ([*EVALUATE, "--resize", "8x8"], "write SIDE or SIDE,CROP"),
    "calibrate": ([*TRADE, "--calibrate", "digitz"], "did you mean digits?"),
    "normalize": ([*EVALUATE, "--normalize", "0.5"], "write MEAN,.../STD,... by channel"),
    "eps": ([*EVALUATE, "--norm", "Linf", "--eps", "8"], "did you mean 8/255?"),
    "ratios": ([*TRADE, "--ratios", "2"], "ratio must be a number in [0, 1]"),
    "kinds": ([*TRADE, "--kinds", "hard,hart"], "did you mean 'hard'?"),
    "where": (["calibrate", *MODEL, "--where", "conv"], "choose linear+conv or activations"),
    "base": ([*EVALUATE, "--base", "timm"], "write one of timm:NAME"),
}


@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_what_tables_do_not_know_is_not_understood_before_anything_is_loaded(case, capsys, monkeypatch):
    monkeypatch.setattr(given, "model", None)
    monkeypatch.setattr(given, "images", None)
    arguments, words = NOT_UNDERSTOOD[case]
    assert main(arguments) == 2
    assert words in (said := one_line(capsys)) and said.endswith(f"(forged-fx {arguments[0]} --help)\n")


def test_a_list_may_say_which_norm_an_eps_is_of():
    understood.check({"eps": "2", "norm": None, "attacks": "quick"})
    with pytest.raises(options.typer.BadParameter, match="did you mean 2/255"):
        understood.check({"eps": "2"})


def test_a_ratio_may_be_of_one_kind_among_several():
    understood.check({"kind": "0=clamp,*=hard", "ratio": "0=2,*=0.5"})


def test_an_error_of_nobodys_making_says_where_to_look(monkeypatch, capsys):
    monkeypatch.setattr(forged_fx, "compare", lambda a, b: {}["gone"])
    assert main(["compare", "demo", "demo"]) == 1
    assert "KeyError: 'gone' (FORGED_FX_DEBUG=1 shows where)" in one_line(capsys)


@pytest.mark.parametrize(
    "more",
    [[], ["--calibrate", "npz:sorted.npz"], ["--calibrate", "npz:./sorted.npz"], ["--calibrate-limit", "8"]],
)
def test_search_neither_calibrates_on_what_it_confirms_on_nor_sorts_classes_apart(more, monkeypatch):
    """Data without a training part, sorted by class."""
    _, _, x, y = digits.load()
    order = y[:80].argsort()
    np.savez("sorted.npz", x=x[:80, 0][order].numpy(), y=y[:80][order].numpy())
    seen, asked = [], {}

    def calibrated(model, batches, channels):
        seen.extend(batches)

    def searched(model, stats, x, y, confirm, **options):
        asked.update(x=x, y=y, kept=confirm[0], kept_y=confirm[1])
        raise ValueError("enough")

    monkeypatch.setattr(forged_fx, "calibrate", calibrated)
    monkeypatch.setattr(forged_fx, "search", searched)
    arguments = ["forged_fx.digits:cnn", "--weights", "random", "--data", "npz:sorted.npz", "--eps", "0.1"]
    assert main(["search", *arguments, *more]) == 1
    calibrated_on = {one.numpy().tobytes() for batch in seen for one in batch[0]}
    assert len(calibrated_on) == (8 if "8" in more else 40)
    assert calibrated_on <= {one.numpy().tobytes() for one in asked["x"]}
    assert set(asked["y"].tolist()) == set(asked["kept_y"].tolist()) == set(range(10))


def test_an_interrupted_scan_goes_on_where_it_was(monkeypatch, capsys):
    seen = []

    def watched(self, x):
        seen.append(len(x))
        if len(seen) == 12:
            raise KeyboardInterrupt
        return x

    arguments = ["calibrate", *MODEL, "--batch", "64", "--out", "kept.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(given.Model, "inputs", watched)
        assert main(arguments) == 130
        assert "what was done is kept in kept.safetensors.unfinished; the same" in one_line(capsys)
        assert main([*arguments, "--limit", "70"]) == 1
        assert "is a scan of 11 batches, and there are 2: delete it" in one_line(capsys)
        assert main([*arguments, "--batch", "32"]) == 1
        assert "is a scan of other batches than these" in one_line(capsys)
        made = len(seen)
        assert main(arguments) == 0
    assert len(seen) - made == 14 + 3  # the first, the last that was scanned, and the sum of the last
    model = given.model(MODEL[0], MODEL[2], None, None).module
    expected = forged_fx.calibrate(model, digits.load()[0].split(64))
    expected.save("expected.safetensors")
    assert forged_fx.Stats.load("kept.safetensors") == expected
    assert open("kept.safetensors", "rb").read() == open("expected.safetensors", "rb").read()
    assert not list(Path().glob("*kept.safetensors.unfinished*")) and not list(Path().glob(".kept*"))


def test_termination_is_an_interruption_and_the_handler_is_put_back(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(forged_fx, "compare", lambda a, b: signal.raise_signal(signal.SIGTERM))
    assert main(["compare", "demo", "demo"]) == 130
    assert one_line(capsys) == "forged-fx: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupted_evaluation_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(forged_fx, "evaluate", interrupted)
    arguments = ["evaluate", *MODEL, "--eps", "0.1", "--limit", "2"]
    Path("stopped").mkdir()
    assert main([*arguments, "--folder", "stopped"]) == 130
    assert "kept in stopped; the same command goes on" in one_line(capsys)
    assert main(arguments) == 130
    assert one_line(capsys) == "forged-fx: interrupted\n"


def test_numbers():
    assert options.number("8/255", "eps") == 8 / 255
    assert options.number("2**-6", "ratio") == options.number("2^-6", "ratio") == options.number("1/64", "") == 2**-6
    assert options.number("1e-3", "ratio") == 1e-3
    for bad in ("", "1/0", "-1", "__import__('os')", "1.2.3", "2**9**9"):
        with pytest.raises(options.typer.BadParameter):
            options.number(bad, "ratio")
    with pytest.raises(options.typer.BadParameter, match="ratio '-1' is negative"):
        options.number("-1", "ratio")
    assert options.ratio("head=0, layer1.*=2**-7,*=1/64") == {"head": 0, "layer1.*": 2**-7, "*": 1 / 64}
    assert options.ratio("a=off,*=2**-6:0.5") == {"a": None, "*": (2**-6, 0.5)} and options.ratio("off") is None
    assert options.kind("hard") == "hard" and options.kind("0=clamp, *=hard") == {"0": "clamp", "*": "hard"}


@pytest.mark.parametrize(("read", "first"), [(options.ratio, "2**-6"), (options.kind, "hard")])
def test_what_is_said_of_one_site_is_said_of_the_others_too(read, first):
    how = f"which site is {first!r} for? For all others write '7={first},*={first}'"
    with pytest.raises(options.typer.BadParameter, match=re.escape(how)):
        read(f"{first},7={first}")


def test_ratios_of_a_sweep():
    assert options.ratios("2**-7, 1/64,off") == [2**-7, 2**-6, None]
    assert options.ratios("hard=2**-7,2**-6,clamp=0.7,band=2**-6:0.5") == {
        "hard": [2**-7, 2**-6],
        "clamp": [0.7],
        "band": [(2**-6, 0.5)],
    }
    for wrong in ("conv1=2**-7,*=2**-6", "2**-7,hard=2**-6", "hard=2**-7,=1/64"):
        with pytest.raises(options.typer.BadParameter, match="is no kind"):
            options.ratios(wrong)


def test_only_the_first_process_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    output.show({}, "text", as_json=False)
    assert capsys.readouterr().out == ""


def test_a_verdict_is_no_failure_of_a_process(monkeypatch, capsys):
    """torchrun would end the others, and whatever they print."""
    command = ["compare", "demo", "demo"]
    assert main(command) in EXIT_CODES.values() and main(command) > 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 0
    assert main(["compare", "demo", "gone"]) == 1


def test_a_rank_without_a_world_is_alone(monkeypatch, capsys):
    """`joined` sees one process there, so it scans every batch, and prints."""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    batches = given.images("digits", None, None, usual="train").batches(500, None)
    assert len(given.share(batches)) == len(batches) > 2
    output.show({}, "text", as_json=False)
    assert capsys.readouterr().out == "text\n"


def test_a_folder_that_is_called_like_a_source_is_no_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "forged_fx.digits"):
        (tmp_path / name).mkdir()
        output.apart({"model": "forged_fx.digits:cnn", "data": "digits", "folder": Path(name)})


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="pipe is no file but a device"):
        STATISTICS.check(tmp_path / "pipe")


def test_weights_of_an_older_version_may_be_written_over(tmp_path):
    save_file({"0.weight": torch.ones(2), "0.forged_limit": torch.ones(())}, tmp_path / "older")
    WEIGHTS.check(tmp_path / "older")
    save_file({"0.weight": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(FileExistsError, match="other is there already"):
        WEIGHTS.check(tmp_path / "other")


def test_figures_are_written_over_no_other_figures(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"rows": [1], "speeds": [], "sites": []}')
    with pytest.raises(FileExistsError, match="is there already, and is no file of forged_fx's figures"):
        Lipschitz().save(path)
    path.unlink()
    for _ in range(2):
        Lipschitz().save(path)


def test_a_folder_may_be_called_as_the_model_is():
    """What stands behind the colon of timm:NAME is no path; of cifar10:DIR it is."""
    from forged_fx.cli.output import READ

    assert READ["model"]("timm:resnet18") == [""] and READ["base"]("package.module:net") == [""]
    assert READ["model"]("hf:folder") == ["folder"] and READ["data"]("cifar10:folder") == ["folder"]
