"""Which forwards always do what calibration saw."""

import enum
import functools
import gc
import importlib
import logging
import math
import types
import weakref
from typing import ClassVar

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

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


class Policy:
    """What a layer may hold, and ask by name."""

    def prepare(self, x, training=False):
        return x * 0.5 if training else x

    @staticmethod
    def static(x, training=False):
        return x * 0.5 if training else x

    __call__ = prepare


def prepared(x, training=False):
    return x * 0.5 if training else x


def straight(x, training=False):
    return x * 2


POLICY, PARTIAL, TABLE = Policy(), functools.partial(prepared), [lambda x: x, lambda x: x * 0.5]
STRAIGHT, NAMES = functools.partial(straight), types.SimpleNamespace(prepared=prepared, straight=straight, scale=2.0)


class Slots:
    __slots__ = ("call", "scale")

    def __init__(self):
        self.call, self.scale = prepared, 2.0


class Doubled:
    """Of one operand of `|`."""

    def __ror__(self, x):
        return x * 2 if x.dim() == 2 else x


class Mode(enum.Enum):
    ONE = 1
    CALL = (prepared,)


class Refused(ValueError):
    pass


class Quantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.round()


class QuantizedInTraining(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round() if x.dim() == 2 else x


class Holds(nn.Linear):
    """A layer that has much: what its forward names of it says what it may do."""

    def __init__(self, forward):
        super().__init__(4, 4)
        self.policy, self.bound, self.partial = Policy(), POLICY.prepare, functools.partial(prepared)
        self.fns, self.by_name, self.sizes = TABLE, {"relu": F.relu, "gelu": F.gelu}, [1, (2, 3)]
        self.find, self.names, self.slots, self.doubled = {0: prepared}.get, NAMES, Slots(), Doubled()
        self.a, self.b, self.scale = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(4, 2)), torch.ones(())
        self.part, self.parts = Masked(), nn.ModuleList([nn.Identity(), MaskedInTraining()])
        type(self).run = forward

    def __init_subclass__(cls):
        cls.forward = lambda self, x: self.run(x)

    @functools.cached_property
    def kept(self):
        return prepared if self.scale else straight

    @classmethod
    def of_the_class(cls, x):
        return x


def holds(forward, *defaults):
    """A layer with this forward."""
    forward.__defaults__ = defaults or None
    return type("Own", (Holds,), {})(forward)


HELD = {
    "an object's method": (lambda s, x: F.linear(s.policy.prepare(x, s.training), s.weight), False),
    "a global object's": (lambda s, x: F.linear(POLICY.prepare(x, s.training), s.weight), False),
    "a class's": (lambda s, x: F.linear(Policy.static(x, s.training), s.weight), False),
    "a class's own object": (lambda s, x: F.linear(Policy().prepare(x), s.weight), False),
    "an object that is called": (lambda s, x: F.linear(s.policy(x, s.training), s.weight), False),
    "an operand": (lambda s, x: F.linear(x | s.doubled, s.weight), False),
    "a global partial": (lambda s, x: F.linear(PARTIAL(x, s.training), s.weight), False),
    "a straight one": (lambda s, x: F.linear(STRAIGHT(x, s.training), s.weight), True),
    "a partial": (lambda s, x: F.linear(s.partial(x, s.training), s.weight), False),
    "a bound method": (lambda s, x: F.linear(s.bound(x, s.training), s.weight), False),
    "a table": (lambda s, x: F.linear((s.fns[s.training])(x), s.weight), False),
    "a global table": (lambda s, x: F.linear((TABLE[s.training])(x), s.weight), False),
    "a table, mapped": (lambda s, x: F.linear(*map(TABLE[s.training], [x]), s.weight), False),
    "a table of a library's": (lambda s, x: F.linear(*map(s.by_name["relu"], [x]), s.weight), True),
    "a table's method": (lambda s, x: F.linear(*map(s.find(0), [x]), s.weight), False),
    "a cached property": (lambda s, x: F.linear(*map(s.kept, [x]), s.weight), False),
    "a class method": (lambda s, x: F.linear(s.of_the_class(x), s.weight), True),
    "a namespace": (lambda s, x: F.linear(s.names.prepared(x), s.weight), False),
    "what is straight there": (lambda s, x: F.linear(s.names.straight(x), s.weight), True),
    "a number there": (lambda s, x: F.linear(x, s.weight * s.names.scale), True),
    "the namespace itself": (lambda s, x: F.linear(*map(vars(s.names)["prepared"], [x]), s.weight), False),
    "a slot": (lambda s, x: F.linear(s.slots.call(x), s.weight), False),
    "a number in one": (lambda s, x: F.linear(x, s.weight * s.slots.scale), True),
    "an attribute's attribute": (lambda s, x: F.linear(s.part.policy.prepare(x), s.weight), False),
    "a part": (lambda s, x: F.linear(x, s.part(s.weight)), True),
    "a part's method": (lambda s, x: F.linear(x, s.weight * s.part.mask()), True),
    "one that branches": (lambda s, x: F.linear(x, s.weight * s.parts[1].mask()), False),
    "a number of an enumeration": (lambda s, x: F.linear(x, s.weight * Mode.ONE.value), True),
    "a function of one": (lambda s, x: F.linear(Mode.CALL.value[0](x), s.weight), False),
    "sizes": (lambda s, x: F.linear(x, s.weight.view(*s.sizes[:0], *s.weight.shape)), True),
    "low rank": (lambda s, x: F.linear(x, s.weight + s.b @ s.a), True),
    "scaled": (lambda s, x: F.linear(x, s.weight * s.scale, s.bias), True),
    "standardized": (
        lambda s, x: F.linear(x, (s.weight - s.weight.mean()) / (s.weight.var(dim=1, keepdim=True) + 1e-5).sqrt()),
        True,
    ),
    "numbers": (lambda s, x: F.linear(x, s.weight * math.sqrt(s.in_features) / max(1, len(s.weight.size()))), True),
    "of one dtype": (lambda s, x: torch.addmm(s.bias, x, s.weight.to(x.dtype).t()).view(x.shape), True),
    "a function with a backward": (lambda s, x: F.linear(x, Quantized.apply(s.weight)), True),
    "one that branches in it": (lambda s, x: F.linear(x, QuantizedInTraining.apply(s.weight)), False),
    "super": (lambda s, x: nn.Linear.forward(s, x), True),
    "found by its name": (lambda s, x: F.linear(importlib.import_module("math").floor(x), s.weight), False),
    "a log": (lambda s, x: (logging.getLogger(__name__).debug("%s", x.shape), F.linear(x, s.weight))[1], True),
}


@pytest.mark.parametrize(("forward", "expected"), HELD.values(), ids=HELD)
def test_what_code_names_is_known_or_may_do_anything(forward, expected):
    assert is_straight(holds(forward)) == expected


def test_a_default_may_be_a_function():
    def of_a_default(s, x, fn=None):
        return F.linear(x, s.weight * fn)

    def called(s, x, fn=None):
        return F.linear(fn(x), s.weight)

    def mapped(s, x, fn=None):
        return F.linear(*map(fn, [x]), s.weight)

    assert is_straight(holds(of_a_default, 2.0)) and is_straight(holds(mapped, straight))
    assert not is_straight(holds(mapped, prepared)) and not is_straight(holds(mapped, POLICY))
    assert not is_straight(holds(called, straight))  # it may be given another


def test_what_is_imported_within_is_not_looked_for():
    def imports(s, x):
        from nets import Asserts

        return F.linear(x, s.weight * Asserts(s))

    assert not is_straight(holds(imports))


def test_an_error_of_ones_own_may_be_raised():
    def raises(s, x):
        if x.dim() > 2:
            raise Refused(f"{x.shape} in {s.sizes}")
        return F.linear(x, s.weight)

    assert is_straight(holds(raises))


def test_a_librarys_layer_is_read_where_it_is_someones_own():
    class Convolves(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x * 2 if self.training else x, weight, bias)

    class Named(nn.Conv2d):
        def extra_repr(self):
            return "" if self.training else super().extra_repr()

    assert not is_straight(Convolves(3, 3, 3))
    assert is_straight(Named(3, 3, 3))


def test_a_decorator_that_gives_itself_out_for_a_librarys_function_is_read():
    def halves(forward):
        @functools.wraps(forward)
        def around(self, x):
            return forward(self, x * 0.5 if self.training else x)

        return around

    assert not is_straight(with_a_forward(halves(nn.Linear.forward)))
    assert is_straight(with_a_forward(torch.no_grad()(nn.Linear.forward)))
    assert not is_straight(with_a_forward(torch.no_grad()(scaled)))


def test_a_librarys_function_that_chooses_is_read_where_it_is_called():
    layers = pytest.importorskip("timm.layers")
    assert not is_straight(holds(lambda s, x: F.linear(layers.drop_path(x, 0.5, s.training), s.weight)))
    assert is_straight(layers.ScaledStdConv2d(3, 3, 3)) and is_straight(layers.StdConv2dSame(3, 3, 3))


def test_what_holds_itself_is_not_followed_for_ever():
    layer = holds(lambda s, x: F.linear(x, s.weight * s.sizes[0]))
    layer.sizes.append(layer.sizes)
    assert not is_straight(layer)


FORWARDS = {
    "torch's": (lambda: nn.Conv2d(3, 3, 3, padding_mode="circular"), True),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), True),
    "parametrized by one's own": (lambda: register_parametrization(Masked(), "weight", MaskedInTraining()), True),
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
