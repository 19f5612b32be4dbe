"""Arguments of no use are refused at once, in words that name the argument, what it is, and the next step."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import forged_fx
from forged_fx.evaluate import Result
from forged_fx.search import Search
from forged_fx.sweep import Sweep

LAYERS = nn.Flatten, lambda: nn.Linear(16, 5)
X = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 5
WITH = {"eps": 0.1, "attacks": ["apgd-ce"]}


class Then(nn.Module):
    """A model whose logits are made into something else."""

    def __init__(self, then):
        super().__init__()
        self.model, self.then = nn.Sequential(*(make() for make in LAYERS)), then
        self.eval()

    def forward(self, x):
        return self.then(self.model(x))


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    model = nn.Sequential(*(make() for make in LAYERS)).eval()
    stats = forged_fx.calibrate(model, [X])
    return model, stats, forged_fx.transform(model, stats, 0.1)


CASES = {
    "one tensor": (TypeError, r"pass \[x\] for one batch", lambda m, s, f: forged_fx.sparsity(f, X)),
    "no batches": (TypeError, "batches is NoneType", lambda m, s, f: forged_fx.sparsity(f, None)),
    "no model": (TypeError, "the model is str; sparsity takes", lambda m, s, f: forged_fx.sparsity("f", [X])),
    "none of them": (
        ValueError,
        "max_batches=0: at least 1",
        lambda m, s, f: forged_fx.sparsity(f, [X], max_batches=0),
    ),
    "nothing": (TypeError, "the model is NoneType; describe takes", lambda m, s, f: forged_fx.describe(None)),
    "no forged model": (TypeError, "the forged model is NoneType", lambda m, s, f: forged_fx.lipschitz(m, None, X)),
    "no plain model": (TypeError, "the plain model is NoneType", lambda m, s, f: forged_fx.lipschitz(None, f, X)),
    "no radius": (ValueError, "eps=None must be", lambda m, s, f: forged_fx.lipschitz(m, f, X, eps=None)),
    "a negative radius": (ValueError, "eps=-1 must be", lambda m, s, f: forged_fx.lipschitz(m, f, X, eps=-1)),
    "no steps": (TypeError, "steps=None: a whole", lambda m, s, f: forged_fx.lipschitz(m, f, X, steps=None)),
    "no batch": (ValueError, "batch_size=0: at least 1", lambda m, s, f: forged_fx.lipschitz(m, f, X, batch_size=0)),
    "classes": (
        TypeError,
        "returns torch.int64: classes, maybe",
        lambda m, s, f: forged_fx.evaluate(Then(lambda out: out.argmax(1)), x=X, y=Y, **WITH),
    ),
    "one score": (
        ValueError,
        r"shape \(6,\) for 6 inputs; expected \(n, classes\); of one score s for each input make two",
        lambda m, s, f: forged_fx.evaluate(Then(lambda out: out[:, 0]), x=X, y=Y, **WITH),
    ),
    "no attacks": (
        TypeError,
        "attacks=None: a list of names",
        lambda m, s, f: forged_fx.evaluate(m, x=X, y=Y, eps=0.1, attacks=None),
    ),
    "a seed beyond all bits": (
        ValueError,
        "seed=1180591620717411303424: a whole number that 64 bits hold",
        lambda m, s, f: forged_fx.evaluate(m, x=X, y=Y, **WITH, seed=2**70),
    ),
    "text for a ratio": (
        TypeError,
        "ratios: '1/64' is no number",
        lambda m, s, f: forged_fx.sweep(m, s, X, Y, **WITH, ratios=["1/64"]),
    ),
    "a tensor for a ratio": (
        TypeError,
        r"ratios: tensor\(0.1000\) is no number",
        lambda m, s, f: forged_fx.sweep(m, s, X, Y, **WITH, ratios=torch.tensor([0.1])),
    ),
    "no seed": (TypeError, "seed=None: a whole", lambda m, s, f: forged_fx.evaluate(m, x=X, y=Y, **WITH, seed=None)),
    "nothing at a time": (
        TypeError,
        "batch_size=None: a whole number of at least 1",
        lambda m, s, f: forged_fx.evaluate(m, x=X, y=Y, **WITH, batch_size=None),
    ),
    "a sweep of nothing": (TypeError, "sweep forges an nn", lambda m, s, f: forged_fx.sweep(None, s, X, Y, **WITH)),
    "no rounds": (TypeError, "rounds=None", lambda m, s, f: forged_fx.sweep(m, s, X, Y, **WITH, rounds=None)),
    "a search of nothing": (TypeError, "search forges an nn", lambda m, s, f: forged_fx.search(None, s, X, Y, **WITH)),
    "no statistics": (
        TypeError,
        "search takes statistics that forged_fx.calibrate returned, or their file's path, not NoneType",
        lambda m, s, f: forged_fx.search(m, None, X, Y, **WITH),
    ),
    "batches for statistics": (
        TypeError,
        "search takes statistics .*, not list",
        lambda m, s, f: forged_fx.search(m, [X], X, Y, **WITH),
    ),
    "a traced model": (
        ValueError,
        "TorchScript, which cannot be opened: calibrate the model that it was made from",
        lambda m, s, f: forged_fx.calibrate(torch.jit.trace(m, X), [X]),
    ),
    "another shape": (
        RuntimeError,
        r"the model fails on a batch of shape \(6, 4\).*expected 4D input",
        lambda m, s, f: forged_fx.evaluate(nn.BatchNorm2d(5).eval(), x=X[:, 0, 0], y=Y, **WITH),
    ),
    "no budget": (TypeError, "budget=None", lambda m, s, f: forged_fx.search(m, s, X, Y, **WITH, budget=None)),
    "no number": (TypeError, "seconds='3'", lambda m, s, f: forged_fx.search(m, s, X, Y, **WITH, seconds="3")),
    "no bound": (
        ValueError,
        "max_natural_loss=None",
        lambda m, s, f: forged_fx.search(m, s, X, Y, **WITH, max_natural_loss=None),
    ),
    "no share": (ValueError, "confirm=None: a", lambda m, s, f: forged_fx.search(m, s, X, Y, **WITH, confirm=None)),
    "no model to fit": (TypeError, "of an nn.Module, not of NoneType", lambda m, s, f: s.check_model(None)),
    "no site": (ValueError, "sites: '9' matches no site; the sites are '1'$", lambda m, s, f: s.thresholds(0.1, ["9"])),
    "a glob for a site": (
        ValueError,
        "sites: '\\*' is a glob, and names belong there",
        lambda m, s, f: s.thresholds(0.1, ["*"]),
    ),
    "a name for names": (TypeError, "sites='1': a list", lambda m, s, f: s.thresholds(0.1, "1")),
    "three for two": (
        ValueError,
        r"^confirm=\[tensor\(.{,120}\.\.\.: a share",
        lambda m, s, f: forged_fx.search(m, s, X, Y, **WITH, confirm=[X, Y, Y]),
    ),
    "another dtype": (
        TypeError,
        "the plain model has torch.float16 weights",
        lambda m, s, f: forged_fx.lipschitz(nn.Sequential(*(make() for make in LAYERS)).half(), f, X),
    ),
    "no name": (TypeError, "ratio: 1 is no name of a site", lambda m, s, f: s.thresholds({1: 0.1})),
    "no scan": (TypeError, "not NoneType", lambda m, s, f: s.merge(None)),
    "no runs": (TypeError, "compare takes a path, not NoneType", lambda m, s, f: forged_fx.compare(None, None)),
    "no such run": (FileNotFoundError, r"^nope holds no result.json", lambda m, s, f: forged_fx.compare("nope", "no")),
    "no such result": (FileNotFoundError, "nope holds no result.json", lambda m, s, f: Result.load("nope")),
    "no such sweep": (
        FileNotFoundError,
        r"no sweep.json: forged_fx.sweep\(",
        lambda m, s, f: Sweep.load("nope"),
    ),
    "no such search": (FileNotFoundError, "nope holds no search.json", lambda m, s, f: Search.load("nope")),
    "no path": (TypeError, "Search.load takes a path, not int", lambda m, s, f: Search.load(1)),
}


@pytest.mark.parametrize(
    ("batch", "hint"),
    [
        ((X * 255).byte(), r"of shape \(6, 1, 4, 4\), torch.uint8: if these are pixels, pass x.float\(\) / 255"),
        (X.double(), r"torch.float64, and the weights are torch.float32: cast the batches, x.to\(torch.float32\)"),
        (X[..., 1:], r"of shape \(6, 1, 4, 3\), torch.float32: is that the size that the model takes"),
        ({"input": X.numpy()}, r"which holds ndarray and no tensor: torch.as_tensor\(...\) makes one"),
        ((Y, X), r"of shape \(6,\), torch.int64, which is the first item .* is the order \(label, image\)\?"),
        (torch.ones(6, 8, 8, 1), r"of shape \(6, 8, 8, 1\), torch.float32: is that NHWC\? x.permute\(0, 3, 1, 2\)$"),
        (X / 0, r"of shape \(6, 1, 4, 4\), torch.float32$"),
    ],
    ids=["bytes", "dtype", "size", "numpy", "labels first", "channels last", "infinite"],
)
def test_calibration_names_what_a_batch_lacks(batch, hint, given):
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)) as raised:
        forged_fx.calibrate(given[0], [batch])
    assert re.search(hint, raised.value.__notes__[0])


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused(case, given):
    kind, message, call = CASES[case]
    with pytest.raises(kind, match=message):
        call(*given)


def test_numpys_numbers_are_numbers(given, tmp_path):
    model, stats, forged = given
    four, part = np.int64(4), np.float32(0.25)
    plain, numpys = {"seed": 4, "batch_size": 4}, {"seed": four, "batch_size": four}
    calls = {
        "evaluate": lambda how, **_: forged_fx.evaluate(model, x=X, y=Y, **WITH, **how),
        "sweep": lambda how, ratio, **_: forged_fx.sweep(model, stats, X, Y, **WITH, **how, ratios=[ratio], rounds=0),
        "search": lambda how, ratio, number: forged_fx.search(
            model, stats, X, Y, **WITH, **how, budget=number, finalists=number, max_natural_loss=ratio, seconds=number
        ),
        "lipschitz": lambda how, ratio, number: forged_fx.lipschitz(model, forged, X, eps=ratio, steps=number, **how),
        "sparsity": lambda how, number, **_: forged_fx.sparsity(forged, [X], max_batches=number),
    }
    for name, call in calls.items():
        folder = {"folder": tmp_path / name} if name in ("evaluate", "sweep", "search") else {}
        found = call(numpys | folder, ratio=part, number=four)
        if folder:  # and it is the same call
            assert repr(call(plain | folder, ratio=0.25, number=4)) == repr(found)


def test_a_file_of_weights_is_called_so(given, tmp_path):
    save_file(given[0].state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"it holds tensors such as a model's weights \('1.bias, 1.weight'\) and no"):
        forged_fx.Stats.load(tmp_path / "weights.safetensors")
    save_file({}, tmp_path / "none.safetensors", {"forged_fx.stats": '{"format": 1}'})
    with pytest.raises(ValueError, match=r"\(it lacks 'sites'\)"):
        forged_fx.Stats.load(tmp_path / "none.safetensors")
