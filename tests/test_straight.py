"""Which forwards always do what calibration saw."""

import functools
import gc
import weakref
from typing import ClassVar

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from forged_fx.straight import is_straight


class Masked(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        return F.linear(x, self.weight * self.mask(), self.bias)

    def mask(self):
        return 1.0


class MaskedInTraining(Masked):
    def mask(self):
        return 1.0 if self.training else 2.0


class Checks(Masked):
    def forward(self, x):
        if not x.is_floating_point():
            raise TypeError(x.dtype)
        return super().forward(x)


class ChecksOverABranch(Checks, MaskedInTraining):
    pass


class Raises(Masked):
    def forward(self, x):
        if x.dim() > 2:
            raise ValueError(x.dim())
        else:
            x = x * 2
        return super().forward(x)


class Property(Masked):
    def forward(self, x):
        return F.linear(x, self.scaled)

    @property
    def scaled(self):
        return self.weight if self.training else self.weight / 2


def scaled(layer, x):
    return F.linear(x if layer.training else x * 2, layer.weight)


class Helped(Masked):
    def forward(self, x):
        return scaled(self, x)


def decorated(forward):
    def around(self, x):
        return forward(self, x)

    return around


class Decorated(Masked):
    @decorated
    def forward(self, x):
        return F.linear(x and x, self.weight)


def with_a_forward(forward):
    layer = nn.Linear(4, 4)
    layer.forward = functools.partial(forward, layer)
    return layer


class Dispatches(Masked):
    WAYS: ClassVar[dict] = {True: lambda x: x, False: lambda x: x * 2}

    def forward(self, x):
        return F.linear(self.WAYS[x.dim() == 2](x), self.weight)


class ByName(Masked):
    how = "mask"

    def forward(self, x):
        return F.linear(x, self.weight * getattr(self, self.how)())


class Given(Masked):
    def __init__(self, before):
        super().__init__()
        self.before = before

    def forward(self, x):
        return F.linear(self.before(x), self.weight)


FORWARDS = {
    "torch's": (lambda: nn.Conv2d(3, 3, 3, padding_mode="circular"), True),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), True),
    "a method": (Masked, True),
    "a method that branches": (MaskedInTraining, False),
    "checks": (Checks, True),
    "assertions": (nets.Asserts, True),
    "a branch beyond them": (ChecksOverABranch, False),
    "an else": (Raises, False),
    "a property that branches": (Property, False),
    "a helper that branches": (Helped, False),
    "beneath a decorator": (Decorated, False),
    "a table": (Dispatches, False),
    "by name": (ByName, False),
    "a function of its own": (lambda: Given(lambda x: x if x.dim() == 2 else x * 2), False),
    "a straight function of its own": (lambda: Given(torch.sin), True),
    "one that was set": (lambda: with_a_forward(scaled), False),
    "torch's that was set": (lambda: with_a_forward(nn.Linear.forward), True),
}


@pytest.mark.parametrize(("make", "straight"), FORWARDS.values(), ids=FORWARDS)
def test_what_branches(make, straight):
    assert is_straight(make()) == straight


@pytest.mark.parametrize(
    ("does", "straight"), [("x", True), ("x if x.dim() else -x", False), ("[-y for y in x]", False)]
)
def test_code_without_a_source_is_read_as_it_was_compiled(does, straight):
    scope = {"nn": nn}
    exec(f"class Plain(nn.Identity):\n    def forward(self, x): return {does}", scope)
    assert is_straight(scope["Plain"]()) == straight
    assert is_straight(with_a_forward(eval(f"lambda layer, x: {does}"))) == straight


def test_asking_keeps_no_module_alive():
    def forward_of(layer):
        return lambda x: F.linear(x, layer.weight)

    layer = nn.Linear(4, 4)
    layer.forward = forward_of(layer)
    assert is_straight(layer)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None
