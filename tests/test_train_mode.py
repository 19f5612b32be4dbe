"""A forward that hands on its mode, as to F.dropout, is one graph, which asks for the mode in each run."""

import copy
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from written import graphs_run_as_traced

import forged_fx

BY_MODE = "its forward does one thing in train mode and another in eval mode"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return F.dropout(self.fc(x.relu()), 0.5, self.training)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Sequential(Block(), Block()), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.dropout(self.blocks(x), training=self.training))


def forged_of(model, x, **options):
    return forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0, **options)


def seeded(model, x):
    """With gradients and without, where it runs by other code."""
    torch.manual_seed(1)
    result = model(x)
    with torch.no_grad():
        return torch.cat([result, model(x)])


def equal_in_all_modes(forged, model, x, within=("",)):
    """Wherever the module is that is in another mode than the rest."""
    for training in (False, True):
        for name in within:
            for one in (forged, model):
                one.train(training).get_submodule(name).train(True)
            assert torch.equal(seeded(forged, x), seeded(model, x)), (training, name)
    assert torch.equal(seeded(forged.eval(), x), seeded(model.eval(), x))
    assert not torch.equal(seeded(forged.train(), x), seeded(model, x))


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(5, 8)


COPIES = {"itself": lambda m: m, "a copy": copy.deepcopy, "a pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("training", [False, True])
def test_it_is_one_graph_in_every_mode(x, made, training):
    model = Net().train(training)
    forged = made(forged_of(model, x))
    assert isinstance(forged, torch.fx.GraphModule) and forged.forging.not_whole is None
    assert all(module.training is training for module in forged.modules())
    assert [name for name, _ in forged.named_modules()] == [name for name, _ in model.named_modules()]
    assert {name for name in forged.state_dict() if "forged_threshold" not in name} == model.state_dict().keys()
    equal_in_all_modes(forged, model, x, ["", "blocks", "blocks.1"])


def test_fused_and_compiled_too(x):
    model = Net()
    forged = forged_of(model.eval(), x, fuse=True)
    assert forged.forging.fused
    equal_in_all_modes(forged, model, x, ["", "blocks.0"])
    with graphs_run_as_traced():
        fast = torch.compile(forged_of(model.eval(), x), backend="forged")
        equal_in_all_modes(fast, model, x)


def test_its_program_is_of_the_mode_that_it_was_exported_in(x):
    model = Net().eval()
    forged = forged_of(model, x)
    assert torch.equal(torch.export.export(forged, (x,)).module()(x), model(x))


class Asks(Net):
    """`how` tells what is handed on to F.dropout."""

    how = staticmethod(lambda model: model.training)

    def forward(self, x):
        return self.head(F.dropout(self.blocks(x), 0.5, self.how(self)))


class HandsDown(Net):
    """Its own mode, to a module that is in another one."""

    class Told(Block):
        def forward(self, x, training):
            return F.dropout(self.fc(x), 0.5, training)

    def __init__(self):
        super().__init__()
        self.told = self.Told()

    def forward(self, x):
        return self.head(self.told(x, self.training))


def test_the_mode_is_that_of_the_module_that_it_was_read_from(x):
    model = HandsDown().eval()
    forged = forged_of(model, x)
    assert forged.forging.not_whole is None
    equal_in_all_modes(forged, model, x, ["", "told"])


# what is handed to F.dropout, and is not the mode itself
NOT_HANDED_ON = {
    "its opposite's": lambda model: not (not model.training),
    "it is True": lambda model: model.training is True,
    "it equals True": lambda model: model.training == True,  # noqa: E712
    "arithmetic": lambda model: bool(1 * model.training),
    "its words": lambda model: str(model.training) == "True",
    "looked up": lambda model: {True: True}.get(model.training, False),
    "a layer's": lambda model: model.head.training,
}


@pytest.mark.parametrize("how", NOT_HANDED_ON.values(), ids=NOT_HANDED_ON)
def test_what_decides_by_the_mode_is_no_graph(x, how):
    model = type("Asks", (Asks,), {"how": staticmethod(how)})().eval()
    forged = forged_of(model, x)
    assert forged.forging.not_whole == BY_MODE
    equal_in_all_modes(forged, model, x, ["", "head"])


class OfAConstant(Net):
    def forward(self, x):
        return super().forward(x) * torch.tensor(2.0 if self.training is True else 1.0)


class WithoutGradients(Net):
    def forward(self, x):
        return super().forward(x) + (self.training is True and not torch.is_grad_enabled())


class ByTwo(Net):
    def forward(self, x):
        return super().forward(x + 1 if self.training and not self.blocks.training else x)


class InPlace(Block):
    def forward(self, x):
        h = F.dropout(self.fc(x), 0.5, self.training) - 1
        return F.relu(h, self.training) + h


class Counts(Net):
    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        if self.training is True:
            self.seen += 1
        return super().forward(x)


class Remembers(Net):
    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        self.last = self.training
        return super().forward(x)


class Sets(Net):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5).eval()

    def forward(self, x):
        self.drop.training = self.training
        return super().forward(self.drop(x))


class OfAProperty(Net):
    @property
    def training(self):
        return vars(self)["mode"]

    @training.setter
    def training(self, mode):
        vars(self)["mode"] = mode


class OfASetter(Net):
    def __setattr__(self, name, value):
        if name == "training" and not isinstance(value, bool):
            raise AssertionError("it is True or False")
        super().__setattr__(name, value)


class OfTwoNames(Net):
    def __init__(self):
        super().__init__()
        self.aliases = nn.ModuleList(self.blocks)


def of_its_own():
    model = Net()
    model.blocks.train = types.MethodType(lambda self, mode=True: self, model.blocks)
    return model


NO_GRAPH = [OfAConstant, WithoutGradients, ByTwo, InPlace, Sets, Remembers, Counts, OfAProperty, OfASetter, OfTwoNames]


@pytest.mark.parametrize("make", [*NO_GRAPH, of_its_own], ids=lambda make: make.__name__)
def test_what_else_hangs_on_the_mode_is_in_none(x, make):
    model = make().eval()
    forged = forged_of(model, x)
    assert forged.forging.not_whole == BY_MODE
    equal_in_all_modes(forged, model, x, [name for name, _ in model.named_modules()])
    for one in (forged, model):
        vars(one).update(dict.fromkeys({"seen", "last"} & vars(one).keys(), 0))
        one.train()(x)
    assert [getattr(forged, name, 0) for name in ("seen", "last")] == [getattr(model, n, 0) for n in ("seen", "last")]


def test_a_mode_set_by_hand_counts(x):
    model = Net().eval()
    forged = forged_of(model, x)
    twins = [copy.copy(one.train()).eval() for one in (forged, model)]
    for one in (forged, model):
        one.blocks[1].training = True
    assert torch.equal(seeded(forged, x), seeded(model, x))
    for one in (forged, model):
        one.training = False
    assert torch.equal(seeded(forged, x), seeded(model, x))
    assert not twins[0].training and torch.equal(*(seeded(one, x) for one in twins))
