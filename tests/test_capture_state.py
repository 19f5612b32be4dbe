"""What a forward leaves behind or finds elsewhere than in its input: no graph has it, and the model keeps it."""

import contextlib
import dataclasses
import re
import types
from collections import deque
from typing import ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from asks import clamped_if_tensor, doubled_if_tensor
from captured import AsItIs, is_whole, x_of
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import forged_fx
from forged_fx.proxies import Value

LOG: list = []
CACHE: dict = {}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.between(self.a(x)))

    def between(self, x):
        return x.tanh()


class SetsAWeight(Two):
    """Equalized learning rate: the parent computes what the layer multiplies with."""

    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.randn(4, 4))
        del self.b.weight
        self.b.weight = self.raw.detach() / 2

    def between(self, x):
        self.b.weight = self.raw / 2
        return x


class Masked(nn.Module):
    mask = None

    def forward(self, x):
        return x if self.mask is None else x * self.mask


class SetsAMask(Two):
    """Of inputs that are positive, as all are in calibration."""

    def __init__(self):
        super().__init__()
        self.m = Masked()

    def forward(self, x):
        self.m.mask = (x[:, :1] > -1e9).float()
        return self.b(self.m(self.a(x)))


class SharesAnObject(Two):
    def __init__(self):
        super().__init__()
        self.m = Masked()
        self.now = self.m.now = types.SimpleNamespace(scale=None)

    def forward(self, x):
        self.now.scale = x.abs().amax()
        return self.b(self.m(self.a(x)))


class CountsAList(Two):
    def __init__(self, kind=list):
        super().__init__()
        self.bank = kind()

    def between(self, x):
        self.bank.append(x.detach())
        return x * (2 if len(self.bank) > 12 else 1)


class Clock(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def tick(self):
        self.n += 1
        return self.n


class CountsElsewhere(Two):
    def __init__(self):
        super().__init__()
        self.clock = Clock()

    def between(self, x):
        return x * (2 if self.clock.tick() > 12 else 1)


class KeepsATensor(nn.Module):
    def forward(self, x):
        self.n = (x > 0).sum()
        return x


class ComputesWithWhatIsKept(Two):
    def __init__(self):
        super().__init__()
        self.keeps = KeepsATensor()

    def between(self, x):
        return self.keeps(x) / self.keeps.n.clamp(min=1)


class Logs(Two):
    def between(self, x):
        LOG.append(x.mean())
        return x


class Caches(Two):
    def between(self, x):
        return CACHE.setdefault(self.training, x.detach())


class CachesInItsClass(Two):
    kept: ClassVar[dict] = {}

    def between(self, x):
        return self.kept.setdefault(self.training, x.detach())


class AsksForAutocast(Two):
    def between(self, x):
        return x * (1 if torch.get_autocast_dtype("cpu") is torch.bfloat16 else 2)


class AsksForWords(Two):
    def between(self, x):
        return x * (1 if repr(x.dtype) == "torch.float32" else 2)


class ComputesAWeightOnce(Two):
    def __init__(self):
        super().__init__()
        parametrizations.spectral_norm(self.b)

    def forward(self, x):
        with parametrize.cached():
            return self.b(self.b(self.a(x)))


class Merges(Two):
    """LoRA's: a branch that eval mode adds to the weight."""

    def __init__(self):
        super().__init__()
        self.delta, self.merged = nn.Parameter(torch.randn(4, 4)), False

    def train(self, mode=True):
        super().train(mode)
        if mode is self.merged:
            self.b.weight.data += self.delta.data if self.merged is False else -self.delta.data
            self.merged = not mode
        return self

    def forward(self, x):
        x = self.a(x)
        return self.b(x) if self.merged else self.b(x) + F.linear(x, self.delta)


LOST = {
    "a weight that is set": (SetsAWeight, "changes 'b.weight'"),
    "a mask that is set": (SetsAMask, "changes 'm.mask'"),
    "an object in common": (SharesAnObject, "changes '(m.)?now'"),
    "the length of a list": (CountsAList, "changes 'bank'"),
    "the length of a deque": (lambda: CountsAList(deque), "changes 'bank'"),
    "a count of a module that is only asked": (CountsElsewhere, "changes 'clock.n'"),
    "a tensor that a module keeps": (ComputesWithWhatIsKept, "reads 'a tensor of keeps'"),
    "a list of the file's": (Logs, "changes 'LOG'"),
    "a cache of the file's": (Caches, "changes 'CACHE'"),
    "a cache of the class's": (CachesInItsClass, "changes 'kept'"),
    "the dtype of autocast": (AsksForAutocast, "asks for the dtype of autocast"),
    "a dtype's words": (AsksForWords, "puts into words a value"),
    "a weight that is computed once": (ComputesAWeightOnce, "computes parametrizations once"),
    "a train() that merges": (Merges, "has a train\\(\\) of its own"),
}


@pytest.mark.parametrize(("make", "why"), LOST.values(), ids=LOST)
@pytest.mark.parametrize("training", [False, True])
def test_what_a_forward_leaves_or_asks_is_in_no_graph(make, why, training):
    torch.manual_seed(0)
    model = make().train(training)
    LOG.clear(), CACHE.clear(), CachesInItsClass.kept.clear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x_of()]), 0)
    assert re.search(why, forged.forging.not_whole), forged.forging.not_whole
    assert not any(isinstance(value, Value) for value in [*LOG, *CACHE.values(), *CachesInItsClass.kept.values()])
    assert model.training is training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)  # (merged and taken apart again)


def test_a_module_in_the_graph_that_merges_is_left_as_it_is():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.more, self.merged = nn.Parameter(torch.ones(4)), nn.Parameter(torch.rand(4)), False

        def train(self, mode=True):
            super().train(mode)
            if mode is self.merged:
                self.weight.data += -self.more.data if self.merged else self.more.data
                self.merged = not mode
            return self

        def forward(self, x):
            return x * self.weight if self.merged else x * self.weight + x * self.more

    class Inside(Two):
        def __init__(self):
            super().__init__()
            self.scales = Scales()

        def between(self, x):
            return self.scales(x)

    torch.manual_seed(0)
    model, x = Inside(), x_of()
    stats, expected, before = forged_fx.calibrate(model, [x]), model(x), model.scales.weight.clone()
    forged = forged_fx.transform(model, stats, 0)
    assert is_whole(forged) and torch.equal(forged(x), expected) and torch.equal(model.scales.weight, before)


def test_a_backward_of_its_own_behind_a_forward_that_does_nothing():
    class Rescales(Two):
        def between(self, x):
            return AsItIs.apply(x)

    model, x = Rescales().eval(), x_of().requires_grad_()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x_of()]), 0)
    assert "runs an autograd.Function" in forged.forging.not_whole
    assert torch.equal(*(torch.autograd.grad(one(x).sum(), x)[0] for one in (model, forged)))
    assert "apply" not in vars(AsItIs) and isinstance(vars(AsItIs)["forward"], staticmethod)


def test_a_backward_that_is_defined_in_the_forward():
    def quantized(x):
        class Rounds(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.round()

            @staticmethod
            def backward(ctx, grad):
                return grad

        return Rounds.apply(x)

    class Quantizes(Two):
        def between(self, x):
            return quantized(x)

    model, x = Quantizes().eval(), x_of().requires_grad_()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x_of()]), 0)
    assert "runs an autograd.Function" in forged.forging.not_whole
    assert torch.autograd.grad(forged(x).sum(), x)[0].any() and "apply" not in vars(AsItIs)


MANY = {type(str(k), (), {}) for k in range(20)}


def test_a_set_that_the_code_names_is_the_same_in_any_order():
    class Asks(Two):
        def between(self, x):
            return x if type(self) in MANY else x.tanh()

    for _ in range(3):  # (the order of a copy depends on how the set grew)
        MANY.add(extra := type("extra", (), {}))
        MANY.discard(extra)
        model = Asks().eval()
        assert is_whole(forged_fx.transform(model, forged_fx.calibrate(model, [x_of()]), 0))


OTHERS: list = []
FULL: dict = {"kept": 1}


def test_containers_that_the_code_does_not_name_are_nobodys_business():
    """Another thread writes to them, say; and what it puts into one that is named, it finds there."""

    class Elsewhere(Two):
        def between(self, x):
            appends_elsewhere()
            return x

    class Names(Two):
        def between(self, x):
            FULL["kept"] = FULL["more"] = x
            elsewhere.append(FULL.setdefault("theirs", 2))
            return x

    elsewhere, x = [], x_of()
    model = Elsewhere().eval()
    assert is_whole(forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0))
    model = Names().eval()
    stats = forged_fx.calibrate(model, [x])
    FULL.clear()
    FULL["kept"] = 1
    forged = forged_fx.transform(model, stats, 0)
    assert "changes 'FULL'" in forged.forging.not_whole and elsewhere
    assert FULL["theirs"] == 2 and not any(isinstance(value, Value) for value in FULL.values())


def appends_elsewhere():
    globals()["OTHERS"].append(1)


@dataclasses.dataclass
class Fields:
    x: torch.Tensor
    mask: torch.Tensor | None = None


class Named(NamedTuple):
    x: torch.Tensor
    mask: torch.Tensor | None = None


class ByType(Two):
    """An argument's type decides: 1.0 and an empty list are the same as nothing."""

    def forward(self, x, scale=1):
        x = self.a(x)
        if isinstance(scale, torch.Tensor):
            x = x * scale.sum()
        elif isinstance(scale, (list, tuple)):
            x = sum(scale, x)
        elif isinstance(scale, float):
            x = x + scale - 1
        return self.b(x)


GIVEN = {
    "a number, then a tensor": (1.0, torch.full((1,), 2.0)),
    "a tensor, then a number": (torch.ones(1), 2.0),
    "a number, then a list": (1.0, [torch.ones(6, 4)]),
    "a list, then a tensor": ([], torch.full((1,), 2.0)),
}


@pytest.mark.parametrize(("first", "second"), GIVEN.values(), ids=GIVEN)
def test_the_type_of_an_argument_is_that_of_calibration_or_an_error(first, second):
    model, x = ByType().eval(), x_of()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [{"x": x, "scale": first}]), 0)
    assert torch.equal(forged(x, first), model(x, first))
    with pytest.raises(TypeError, match="calibration gave") if is_whole(forged) else contextlib.nullcontext():
        assert torch.equal(forged(x, second), model(x, second))


class IfThere(Two):
    def __init__(self, take):
        super().__init__()
        self.take = take

    def forward(self, x, given):
        return self.b(self.a(x) * (1 if self.take(given) is None else 2))


THERE = {
    "itself": (lambda given: given, torch.ones(1), None),
    "an item": (lambda given: given["mask"], {"mask": torch.ones(1)}, {"mask": None}),
    "what get finds": (lambda given: given.get("mask"), {"mask": torch.ones(1)}, {}),
    "a place in a list": (lambda given: given[1], [0, torch.ones(1)], [0, None]),
    "a field": (lambda given: given.mask, Fields(x_of(), torch.ones(1)), Fields(x_of())),
    "a named item": (lambda given: given.mask, Named(x_of(), torch.ones(1)), Named(x_of())),
}


@pytest.mark.parametrize(("take", "there", "gone"), THERE.values(), ids=THERE)
def test_what_was_there_in_calibration_is_asked_for(take, there, gone):
    model, x = IfThere(take).eval(), x_of()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [{"x": x, "given": there}]), 0)
    assert is_whole(forged) and torch.equal(forged(x, there), model(x, there))
    with pytest.raises(AssertionError, match="calibration gave"):
        forged(x, gone)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [{"x": x, "given": gone}]), 0)
    assert torch.equal(forged(x, gone), model(x, gone))
    with pytest.raises(AssertionError, match="specialized") if is_whole(forged) else contextlib.nullcontext():
        assert torch.equal(forged(x, there), model(x, there))


def test_an_item_that_was_not_there_is_not_asked_for():
    class PassesOn(Two):
        def forward(self, batch):
            return {"logits": self.b(self.a(batch["x"])), "id": batch.get("id")}

    model, x = PassesOn().eval(), x_of()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [{"batch": {"x": x}}]), 0)
    assert is_whole(forged) and forged({"x": x, "id": 3})["id"] == 3


def test_features_that_are_kept_for_a_look_are_no_hindrance():
    class Keeps(Two):
        def __init__(self):
            super().__init__()
            self.features = {}

        def between(self, x):
            self.features["a"] = x
            return x

    model = Keeps().eval()
    assert is_whole(forged_fx.transform(model, forged_fx.calibrate(model, [x_of()]), 0))


def test_an_argument_that_some_batches_give_and_others_say_is_none():
    model, x = IfThere(lambda given: given).eval(), x_of()
    for several in ([None, torch.ones(1)], [torch.ones(1), None]):
        stats = forged_fx.calibrate(model, [{"x": x, "given": given} for given in several])
        forged = forged_fx.transform(model, stats, 0)
        assert "only some of calibration's batches gave 'given'" in forged.forging.not_whole
        assert all(torch.equal(forged(x, given), model(x, given)) for given in several)


def test_a_question_in_a_function_of_another_file():
    class Asks(Two):
        def forward(self, x, mask=None):
            return self.b(clamped_if_tensor(doubled_if_tensor(self.a(x), mask)))

    model, x = Asks().eval(), x_of()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [{"x": x, "mask": x}]), 0)
    assert is_whole(forged) and torch.equal(forged(x, mask=x), model(x, mask=x))


def test_a_question_about_a_parameter_is_the_parameters():
    class Trains(Two):
        def between(self, x):
            return x * 2 if isinstance(self.a.weight, nn.Parameter) and self.training else x

    model = Trains().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x_of()]), 0)
    assert "in train mode and another in eval mode" in forged.forging.not_whole


def test_what_was_nothing_is_set_in_vain():
    class Optional(Two):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", None)

        def between(self, x):
            return x if self.mask is None else x * self.mask

    model = Optional().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x_of()]), 0)
    with pytest.warns(UserWarning, match="setting 'mask' changes nothing"):
        forged.mask = torch.ones(4)
