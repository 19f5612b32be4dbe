"""A base is what the forged model was made from: where it cannot be, the judge says so."""

import copy

import planted
import pytest
import torch
from planted import evaluate

import forged_fx

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def pair(monkeypatch):
    planted.hurry(monkeypatch)
    plain, _, x, y = planted.strong_and_weak()
    return plain, forged_fx.transform(plain, forged_fx.calibrate(plain, [x]), 2**-6), x, y


def test_a_forged_base_beside_a_plain_model_is_refused(pair):
    plain, forged, x, y = pair
    with pytest.raises(ValueError, match=r"base is forged, and the model is not: evaluate\(forged, base=plain\)"):
        evaluate(plain, forged, x=x, y=y, eps=0.1)


@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.Sequential], ids=["bare", "within another"])
def test_other_weights_than_the_bases_are_said(pair, wrap):
    plain, forged, x, y = pair
    assert not any("weights" in note for note in evaluate(wrap(forged), wrap(plain), x=x, y=y, eps=0.1).notes)
    trained = copy.deepcopy(forged)
    with torch.no_grad():
        next(trained.parameters()).mul_(1.01)
    with pytest.warns(UserWarning, match="the model's weights are not the base's .*not its thresholds' alone"):
        result = evaluate(wrap(trained), wrap(plain), x=x, y=y, eps=0.1)
    assert any(note.startswith("the model's weights are not the base's (1 of ") for note in result.notes)
