"""What is no number, no other model, or no attack's doing must not make a model look robust."""

import contextlib

import pytest
import torch
from planted import evaluate, inputs, linear
from torch import nn

import forged_fx
from forged_fx.evaluate import reach
from forged_fx.evaluate.gradients import Logits, name_of, predicted
from forged_fx.evaluate.harness import predict


class Mean(nn.Module):
    """Class 1 where an input's mean is above a half."""

    def logit(self, mean):
        return 10 * (mean - 0.5)

    def forward(self, x):
        logit = self.logit(x.flatten(1).mean(1))
        return torch.stack([-logit, logit, -9 + 0 * logit, -9 - 0.01 * logit], 1)


class RootInABranch(Mean):
    """Finite everywhere; its gradient is NaN below 0.47, where the branch that is not taken has none."""

    def logit(self, mean):
        return super().logit(mean) + 1e-3 * torch.where(mean > 0.47, (mean - 0.47).sqrt(), 0.0)


@pytest.mark.parametrize("norm, eps", [("L2", 0.6), ("Linf", 0.1)])
def test_a_gradient_that_is_no_number_does_not_lose_what_was_found(norm, eps):
    x = torch.full((12, 1, 6, 6), 0.55) + torch.linspace(0, 0.01, 12).view(-1, 1, 1, 1)
    result = evaluate(RootInABranch().eval(), x=x, y=torch.ones(12).long(), eps=eps, norm=norm, attacks=["apgd-ce"])
    (row,) = (row for row in result.model.rows if row.kind == "true gradient")
    assert result.worst_case == 0 and (row.broken, row.rejected) == (12, 0)


def test_a_logit_that_is_no_number_is_of_no_class():
    logits = torch.tensor([[float("nan")] * 3, [0.0, float("nan"), 1.0], [0.0, 2.0, 1.0]])
    assert predicted(logits).tolist() == [-1, -1, 1]
    assert predict(nn.Identity(), logits, 2).tolist() == [-1, -1, 1]


def test_logits_that_are_no_numbers_on_one_side_lie_apart(monkeypatch):
    class Side:
        name, batch_size, device = "side", 4, torch.device("cpu")

        def __init__(self, model):
            self.model, self.examples, self.broken_by = model, torch.rand(4, 3), torch.full((4,), 1)

    class NaN(nn.Module):
        def forward(self, x):
            return x * float("nan")

    monkeypatch.setattr(reach, "_moved", lambda side: [])
    logits = torch.rand(4, 3)
    same, other = Side(nn.Identity()), Side(NaN())
    assert reach.apart(same, other, logits, logits) == float("inf")
    assert reach.apart(other, Side(NaN()), logits, logits) == 0
    assert reach.apart(same, same, torch.zeros(4, 3), logits) > 1


class Tied(nn.Module):
    def forward(self, x):
        return 0 * x.view(len(x), -1)[:, :4]


def test_the_logits_of_no_input():
    """Square asks for them, and a model may not take none."""
    logits = Logits(Tied())
    assert logits(torch.rand(2, 1, 6, 6)).shape == (2, 4) and logits(torch.rand(0, 1, 6, 6)).shape == (0, 4)


def test_an_attack_ends_where_all_classes_are_tied():
    result = evaluate(Tied().eval(), x=inputs(4), y=torch.zeros(4).long(), attacks=["square"])
    assert result.model.accuracy("natural") == 1


class Merges(nn.Module):
    """Adapters do: in eval mode their weights are added to the layer's."""

    def __init__(self):
        super().__init__()
        self.fc, self.more, self.merged = nn.Linear(36, 4), nn.Parameter(torch.rand(4, 36)), False

    def train(self, mode=True):
        super().train(mode)
        if mode is self.merged:
            with torch.no_grad():
                self.fc.weight += self.more * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x):
        weight = self.fc.weight + (0 if self.merged else self.more)
        return nn.functional.linear(x.flatten(1), weight, self.fc.bias)


def test_a_model_that_does_more_than_set_a_flag_in_train_is_back_as_it_was():
    torch.manual_seed(0)
    model, x = nn.Sequential(Merges()), inputs(4)
    before = model[0].fc.weight.clone()
    with pytest.warns(UserWarning, match="in train mode"):
        evaluate(model, x=x, y=torch.zeros(4).long(), attacks=["noise"])
    forged_fx.calibrate(model, [x])
    assert model.training and model[0].training and not model[0].merged
    assert torch.allclose(model[0].fc.weight, before, atol=1e-6)


def test_a_model_that_only_options_forge_is_judged_compiled(tmp_path):
    x = inputs(6)
    model = linear(classes=4)
    stats = forged_fx.calibrate(model, [x])
    stats.save(tmp_path / "stats")
    fast = torch.compile(model, backend="forged", options={"stats": tmp_path / "stats", "ratio": 2**-1})
    forged = forged_fx.transform(model, stats, 2**-1)
    y = forged(x).argmax(1)
    result = evaluate(fast, x=x, y=y, attacks=["noise"])
    assert result.model.accuracy("natural") == 1 and any("another function eagerly" in note for note in result.notes)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), pytest.raises(ValueError, match="in any graph"):
        fast(x)  # nobody said that it should run plain


class Steep(nn.Module):
    """A number that no state dict holds decides what becomes of inputs that are not even."""

    def __init__(self, steepness):
        super().__init__()
        self.steepness = steepness

    def forward(self, x):
        mean = 4 * (x.mean((1, 2, 3)) - 0.5)
        odd = x[..., ::2].mean((1, 2, 3)) - x[..., 1::2].mean((1, 2, 3))
        logit = mean - self.steepness * odd.abs() * mean.sign()
        return torch.stack([-logit, logit, -9 + 0 * logit, -9 - 0.01 * logit], 1)


def test_a_finished_folder_is_not_returned_for_a_model_of_other_code(tmp_path):
    """It answers alike on all inputs, and on all examples that were found: these are even."""
    x = torch.cat([torch.full((5, 1, 6, 6), 0.45), torch.full((5, 1, 6, 6), 0.2)])
    call = {"x": x, "y": torch.zeros(10).long(), "attacks": ["apgd-ce"], "folder": tmp_path / "run"}
    first = evaluate(Steep(0.0).eval(), **call)
    assert evaluate(Steep(0.0).eval(), **call).worst_case == first.worst_case
    with pytest.raises(ValueError, match="its code has changed"):
        evaluate(Steep(50.0).eval(), **call)


def test_contexts_of_one_name_are_told_apart_by_where_they_are():
    @contextlib.contextmanager
    def straight_through():
        yield

    straight_through.__wrapped__.__qualname__ = straight_through.__qualname__ = "straight_through"
    assert name_of(forged_fx.straight_through) == ("straight_through", True)
    assert name_of(straight_through) == (f"{__name__}.straight_through", True)


def test_lipschitz_under_inference_mode():
    model, x = linear(classes=4), inputs(4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)
    with torch.inference_mode():
        rows = forged_fx.lipschitz(model, forged, x, eps=0.03, steps=2)
    assert rows
