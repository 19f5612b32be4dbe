"""Statistics know the weights that they were measured with."""

import copy

import pytest
import torch
from torch import nn

import forged_fx
from forged_fx.weights import of_weights


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()


@pytest.fixture
def x():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model(x).square().sum().backward()
    optimizer.step()


SAID = r"weights have changed since calibration \('0.weight' and 3 more\).*calibrate again"


def test_a_step_of_training_is_seen_by_whoever_uses_the_statistics(model, x, tmp_path):
    stats = forged_fx.calibrate(model, [x])
    stats.save(tmp_path / "stats.safetensors")
    forged = forged_fx.transform(model, stats)
    assert "weights have changed" not in str(forged_fx.describe(forged))
    trained(forged, x)
    assert "weights have changed since calibration ('0.weight' and 3 more)" in str(forged_fx.describe(forged))
    trained(model, x)
    with pytest.warns(UserWarning, match=SAID):
        forged_fx.transform(model, forged_fx.Stats.load(tmp_path / "stats.safetensors"), example=((x,), {}))
    with pytest.warns(UserWarning, match=SAID):
        torch.compile(model, backend="forged", options={"stats": stats})(x)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "same",
    [
        lambda model: copy.deepcopy(model),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: copy.deepcopy(model).double(),  # the same, to rounding
        lambda model: model.requires_grad_(False),
    ],
    ids=["a copy", "channels_last", "another dtype", "frozen"],
)
def test_the_same_weights_are_the_same(model, x, same):
    stats = forged_fx.calibrate(model, [x])
    model = same(model)
    forged_fx.transform(model, stats, example=((x.to(next(model.parameters()).dtype),), {}))


@pytest.mark.filterwarnings("error")
def test_what_two_scans_disagree_on_is_neither_ones(model, x):
    one = forged_fx.calibrate(model, [x])
    trained(model, x)
    both = one.merge(forged_fx.calibrate(model, [x]))
    forged_fx.transform(model, both)
    assert set(both.weights.values()) == {""}


@pytest.mark.filterwarnings("error")
def test_older_pickles_say_nothing(model, x):
    stats = forged_fx.calibrate(model, [x])
    older = stats.__getstate__()
    del older["weights"]
    (again := forged_fx.Stats()).__setstate__(older)
    assert again.weights == {} and forged_fx.transform(model, again, example=((x,), {}))


def test_older_statistics_say_nothing(model, x):
    stats = forged_fx.calibrate(model, [x])
    stats.weights = {}
    trained(model, x)
    forged_fx.transform(model, stats)


def test_a_weight_that_is_a_part_of_another_has_a_digest():
    """One element of every second: it counts as contiguous, whatever its stride."""
    part = nn.Parameter(torch.tensor([3.0, 4.0])[::2])
    assert part.is_contiguous() and part.stride() == (2,)
    held = nn.ParameterDict({"part": part, "whole": nn.Parameter(torch.tensor([3.0]))})
    digests = of_weights(held)
    assert digests["part"] == digests["whole"] != of_weights(nn.ParameterDict({"part": part + 1}))["part"]
