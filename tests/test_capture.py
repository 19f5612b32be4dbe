"""What a graph would freeze: models that ask for it are forged module by module, and stay themselves."""

import builtins
import contextlib
import copy
import dataclasses
import enum
import pickle
import re
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from captured import is_whole, x_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import forged_fx
from forged_fx import audit


class Mode(enum.Enum):
    DOUBLE, HALF = 2.0, 0.5


def forged_at_zero(model, **how):
    return forged_fx.transform(model, forged_fx.calibrate(model, [x_of()]), 0, **how)


class Keeps(nn.Module):
    """Hands its input on, and keeps it: in a dict, or where a hook would."""

    def __init__(self):
        super().__init__()
        self.store = {}

    def forward(self, x):
        self.store["last"] = x
        return x * 1


class ReadsWhatIsKept(nn.Module):
    def __init__(self):
        super().__init__()
        self.tap, self.fc = Keeps(), nn.Linear(4, 4)

    def forward(self, x):
        x = self.fc(self.tap(x))
        return x + self.tap.store["last"]


def test_a_tensor_that_a_module_keeps_is_that_of_each_run():
    torch.manual_seed(0)
    model = ReadsWhatIsKept().eval()
    forged = forged_at_zero(model)
    assert not is_whole(forged) and "reads a tensor that 'tap' keeps" in forged.forging.not_whole
    for seed in (1, 2):
        assert torch.equal(forged(x_of(seed)), model(x_of(seed)))


SCALES = torch.tensor(3.0)


class ReadsAGlobal(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.scales = nn.Linear(4, 4), [torch.tensor(2.0)]

    def forward(self, x):
        return self.fc(x * SCALES * self.scales[0])


def test_a_tensor_of_the_codes_own_is_no_hindrance():
    model = ReadsAGlobal().eval()
    forged = forged_at_zero(model)
    assert is_whole(forged) and torch.equal(forged(x_of(2)), model(x_of(2)))


PLAIN = builtins.isinstance

ASKS = {
    "isinstance": lambda x: isinstance(x, torch.Tensor),
    "isinstance of several": lambda x: isinstance(x, (list, torch.Tensor)),
    "torch.is_tensor": lambda x: torch.is_tensor(x),
    "no parameter": lambda x: not isinstance(x, nn.Parameter),
    "no list": lambda x: not isinstance(x, list | tuple),
    "a size is none": lambda x: not isinstance(x.shape[0] + x.size(1), torch.Tensor),
    "what is made of it": lambda x: isinstance(x.sin() * 2, torch.Tensor),
}


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
def test_what_is_recorded_is_a_tensor_to_code_that_asks(asks):
    class Clamps(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x.clamp(0, 1) if asks(x) else x)

    model = Clamps().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [torch.rand(5, 4)]), 0)  # of which none is clamped
    assert is_whole(forged) and torch.equal(forged(x := 3 * torch.randn(5, 4)), model(x))
    assert "isinstance" not in globals() and builtins.isinstance is PLAIN


def decorated_elsewhere(forward):
    scope = {"forward": forward}
    exec("def around(self, x): return forward(self, x)", scope)
    scope["around"].__wrapped__ = forward
    return scope["around"]


class Beneath(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    @decorated_elsewhere
    def forward(self, x):
        return self.fc(x.clamp(0, 1) if isinstance(x, torch.Tensor) else x)


def test_a_question_beneath_a_decorator_of_another_file():
    model = Beneath().eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [torch.rand(5, 4)]), 0)
    assert is_whole(forged) and torch.equal(forged(x := 3 * torch.randn(5, 4)), model(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        y = self.rnn(x)
        return self.fc(y if isinstance(y, torch.Tensor) else y[0])


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, xs):
        xs = [xs] if torch.is_tensor(xs) else xs
        return self.fc(xs[0])


class Whole(nn.Module):
    def forward(self, x):
        return x, x


class Unknown(Recurrent):
    def __init__(self):
        super().__init__()
        self.rnn = Whole()


@pytest.mark.parametrize(
    ("model", "given", "whole"),
    [(Recurrent(), lambda x: x, True), (Several(), lambda x: [x], True), (Unknown(), lambda x: x, False)],
)
def test_what_is_no_tensor_is_not_said_to_be_one(model, given, whole):
    batch = {"xs": [x_of(1)]} if isinstance(model, Several) else x_of(1)
    forged = forged_fx.transform(model.eval(), forged_fx.calibrate(model, [batch]), 0)
    assert is_whole(forged) == whole and torch.equal(forged(given(x_of(2))), model(given(x_of(2))))
    if not whole:
        assert "asks for the type of a value" in forged.forging.not_whole


def test_of_statistics_from_a_file_no_argument_is_known_to_be_a_tensor():
    model = Several().eval()
    stats = forged_fx.calibrate(model, [{"xs": [x_of(1)]}])
    stats.example = None
    with pytest.warns(UserWarning, match="forged without an audit"):
        forged = forged_fx.transform(model, stats, 0)
    assert torch.equal(forged([x_of(2)]), model([x_of(2)])) and torch.equal(forged(x_of(2)), model(x_of(2)))
    assert not is_whole(forged) and is_whole(forged_fx.transform(model, stats, 0, example=((), {"xs": [x_of(1)]})))


def test_a_graph_of_torch_fx_is_captured():
    plain = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval())
    assert is_whole(forged_at_zero(plain))


def with_default(default, use):
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, how=default):
            return self.fc(use(x, how))

    return Takes().eval()


DEFAULTS = {
    "an enum": (Mode.DOUBLE, Mode.HALF, lambda x, how: x * how.value),
    "a slice": (slice(0, 3), slice(0, 5), lambda x, how: x[how]),
    "a range": (range(3), range(5), lambda x, how: x[list(how)]),
    "a tensor": (torch.tensor(2.0), torch.tensor(0.5), lambda x, how: x * how),
    "a set": ({1, 2}, {3}, lambda x, how: x * len(how)),
}


@pytest.mark.parametrize(("default", "other", "use"), DEFAULTS.values(), ids=DEFAULTS)
def test_an_argument_that_a_graph_cannot_hold_to_its_default(default, other, use):
    model = with_default(default, use)
    forged = forged_at_zero(model)
    assert not is_whole(forged)
    for args in ((), (default,), (other,)):
        assert torch.equal(forged(x_of(), *args), model(x_of(), *args))


class Constants(nn.Module):
    """Numbers that are neither parameters nor buffers, beside a layer's and a buffer of the same name."""

    def __init__(self):
        super().__init__()
        self.fc, self.c = nn.Linear(4, 4), torch.tensor(0.1)
        self.fc.register_buffer("c", torch.tensor(0.3))

    def forward(self, x):
        return self.fc(x * torch.tensor(0.1)), self.fc(x * self.c), self.fc.c


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
@pytest.mark.parametrize("again", [lambda m: m, copy.deepcopy])
def test_what_no_cast_reaches_in_the_model_none_reaches_in_its_graph(cast, again):
    torch.manual_seed(0)
    model = Constants().eval()
    forged = forged_at_zero(model)
    assert is_whole(forged)
    forged, model = cast(again(forged)), cast(model)
    x = x_of().to(model.fc.weight.dtype)
    assert forged.c.dtype == torch.float32 and forged.fc.c.dtype == model.fc.c.dtype
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(forged(x), model(x), strict=True))


class AsksForAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x * 2 if torch.is_autocast_enabled("cpu") else x)


class AsksForInferenceMode(AsksForAutocast):
    def forward(self, x):
        return self.fc(x * 2 if torch.is_inference_mode_enabled() else x)


@pytest.mark.parametrize(
    ("kind", "context", "why"),
    [
        (AsksForAutocast, lambda: torch.autocast("cpu"), "one thing under autocast and another without"),
        (AsksForInferenceMode, torch.inference_mode, "asks for inference mode"),
    ],
)
def test_a_forward_that_asks_in_which_context_it_runs(kind, context, why):
    model = kind().eval()
    before = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    forged = forged_at_zero(model)
    assert (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")) == before
    assert not is_whole(forged) and why in forged.forging.not_whole
    with torch.no_grad():
        assert torch.equal(forged(x_of()), model(x_of()))
        with context():
            assert torch.equal(forged(x_of()), model(x_of()))


def renames(module, state_dict, prefix, *_):
    """An old checkpoint's key."""
    if prefix + "old.weight" in state_dict:
        state_dict[prefix + "fc.weight"] = state_dict.pop(prefix + "old.weight")


def test_a_module_that_reads_old_checkpoints_goes_on_reading_them():
    block = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4)))
    block.register_load_state_dict_pre_hook(renames)
    forged = forged_at_zero(nn.Sequential(block).eval())
    assert not is_whole(forged) and "hooks on its state dict" in forged.forging.not_whole
    weight = torch.full((4, 4), 2.0)
    forged.load_state_dict({"0.old.weight": weight, "0.fc.bias": torch.zeros(4)})
    assert torch.equal(forged.get_parameter("0.fc.weight"), weight)


class Rounds(torch.autograd.Function):
    """To whole numbers, with the gradient straight through."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


rounded = Rounds.apply


class Block(nn.Module):
    """What `run` does, with a layer on either side."""

    def __init__(self, run):
        super().__init__()
        self.first, self.last, self.run = nn.Linear(4, 4), nn.Linear(4, 2), run

    def forward(self, x):
        return self.last(self.run(self, self.first(x).tanh()))


def without_gradient(block, x):
    with torch.no_grad() if block.training else contextlib.nullcontext():
        return block.first(x)


@torch.no_grad()
def frozen(x):
    return x.sin()


def reentrant(block, x):
    return checkpoint(block.first, x, use_reentrant=True) if torch.is_grad_enabled() else block.first(x)


def saved_elsewhere(block, x):
    with torch.autograd.graph.save_on_cpu():
        return block.first(x)


LOST = {
    "a backward of its own": (lambda block, x: Rounds.apply(x), "runs an autograd.Function"),
    "the same under another name": (lambda block, x: rounded(x), "runs an autograd.Function"),
    "no gradient in training": (without_gradient, "sets the grad mode"),
    "a decorated part, in training": (lambda b, x: frozen(x) if b.training else x.sin(), "sets the grad mode"),
    "a checkpoint in training": (
        lambda b, x: checkpoint(b.first, x, use_reentrant=False) if b.training else b.first(x),
        "checkpoints activations",
    ),
    "a reentrant checkpoint with gradients": (reentrant, "sets the grad mode"),
    "hooks on saved tensors": (saved_elsewhere, "says how tensors are saved"),
}


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize(("run", "why"), LOST.values(), ids=LOST)
def test_what_a_graph_would_lose_of_a_backward(run, why, recording):
    """Forwards are the same, so no audit tells; the gradients are what the plain model has, in either mode."""
    torch.manual_seed(0)
    model, x = Block(run).eval(), torch.randn(6, 4)
    with torch.set_grad_enabled(recording):
        forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0)
    assert re.search(why, forged.forging.not_whole)
    for training in (False, True):
        found = []
        for one in (model, forged):
            one.train(training).zero_grad()
            with forged_fx.straight_through():
                one(leaf := x.clone().requires_grad_()).square().sum().backward()
            found.append([leaf.grad, *(p.grad for p in one.parameters())])
        for plain, ours in zip(*found, strict=True):
            assert ours is plain is None or torch.allclose(plain, ours, atol=1e-6)


class Normalizes(nn.Module):
    """By buffers, of which it makes something in each run."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.full((4,), 0.5))
        self.register_buffer("mask", torch.ones(4, 4))

    def forward(self, x):
        return nn.functional.linear(
            self.fc((x - self.mean.view(1, -1)) / (1 + self.mean[None])), self.fc.weight * (1 - self.mask)
        )


class Lists(nn.Module):
    """It makes its weight of parameters that it goes through."""

    def __init__(self):
        super().__init__()
        self.parts, self.fc = nn.ParameterList([torch.randn(2, 4), torch.randn(2, 4)]), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(nn.functional.linear(x, torch.cat(list(self.parts.parameters()))).tanh())


# how a forward gets at its own tensors
AROUND = {
    "the first of parameters()": lambda m: next(m.parameters()).detach().norm(),
    "a module's own mapping": lambda m: m.fc._parameters["weight"].detach().norm(),
    "a number out of named_parameters()": lambda m: dict(m.named_parameters())["fc.bias"].max().item(),
    "state_dict()": lambda m: m.state_dict()["fc.weight"].norm(),
    "named_buffers()": lambda m: 1 + dict(m.named_buffers())["norm.running_mean"].norm(),
    "a dtype": lambda m: torch.full((1,), 0.1, dtype=next(m.parameters()).dtype),
    "a device": lambda m: torch.full((1,), 0.1, device=next(m.parameters()).device),
}


@pytest.mark.parametrize("reads", AROUND.values(), ids=AROUND)
def test_what_a_forward_reads_around_the_tracer_is_read_in_each_run(reads):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.fc(x)) * reads(self)

    torch.manual_seed(0)
    model, other = Reads().eval(), Reads().double().eval()
    other.norm.running_mean += 3
    forged = forged_at_zero(model).double()
    forged.load_state_dict(other.state_dict())
    assert torch.equal(forged(x_of().double()), other(x_of().double()))
    assert "reads" in str(forged_fx.describe(forged)) and not is_whole(forged)


def test_a_forward_may_ask_a_weight_for_its_shape():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            width = next(self.parameters()).shape[1] + len(dict(self.named_parameters())["fc.bias"])
            return self.fc(x) / width

    assert is_whole(forged_at_zero(Asks().eval()))


class Own(nn.Sequential):
    def __init__(self):
        super().__init__(OrderedDict(body=nn.Linear(4, 4), head=nn.Linear(4, 2)))


class OwnParameters(Own):
    def parameters(self, recurse=True):
        return self.head.parameters(recurse)


class OwnStateDict(Own):
    def state_dict(self, *args, **kwargs):
        return self.head.state_dict(*args, **kwargs)


class OwnRequiresGrad(Own):
    def requires_grad_(self, requires_grad=True):
        self.head.requires_grad_(requires_grad)
        return self


@pytest.mark.parametrize("kind", [OwnParameters, OwnStateDict, OwnRequiresGrad])
def test_what_a_class_answers_in_its_own_way_it_goes_on_answering(kind):
    model = kind().eval()
    forged = forged_at_zero(model)
    for one in (model, forged):
        one.requires_grad_(False)
    assert [p.shape for p in model.parameters()] == [p.shape for p in forged.parameters()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in forged.parameters()]
    assert [name for name in forged.state_dict() if "forged" not in name] == [*model.state_dict()]
    assert "() of its own" in str(forged_fx.describe(forged))


@pytest.mark.parametrize("kind", [Normalizes, Lists])
def test_what_a_forward_makes_of_the_models_tensors_is_made_in_each_run(kind):
    """Of those that the forged model has then: loaded, cast, trained; and the plain model's stay its own."""
    torch.manual_seed(0)
    model, other, x = kind().eval(), kind().eval(), x_of()
    for buffer in other.buffers():
        buffer.mul_(0.25)
    forged = forged_at_zero(model)
    assert is_whole(forged) is (kind is Normalizes)
    forged.load_state_dict(other.state_dict())
    assert torch.equal(forged(x), other(x))
    forged(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    other(x).sum().backward()
    assert all(p.grad is not None for one in (forged, other) for p in one.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for tensor in (*forged.parameters(), *forged.buffers()):
            tensor.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    pickled = pickle.loads(pickle.dumps(forged_at_zero(model)))
    pickled.load_state_dict(other.state_dict())
    assert torch.equal(pickled(x), other(x))
    cast = forged_at_zero(other).bfloat16()
    assert torch.equal(cast(x.bfloat16()), copy.deepcopy(other).bfloat16()(x.bfloat16()))


def looks_up(x):
    return {6: 2.0}.get(x.shape[0], 1.0)


def looks_in_a_set(x):
    return 2.0 if x.shape[0] in {6} else 1.0


def catches(ask):
    def factor(x):
        try:
            return 2.0 if ask(x) else 1.0
        except Exception:
            return 1.0

    return factor


# what code may ask of a value, and how it may miss that torch.fx does not know
ASKED = {
    "a dictionary": looks_up,
    "a set": looks_in_a_set,
    "a truth, caught": catches(lambda x: x.max() > 2),
    "a length, caught": catches(lambda x: len(x) == 6),
    "its rows, caught": catches(lambda x: sum(row[0].abs() for row in x) > 1),
    "a set, caught": catches(lambda x: x.shape[0] in {6}),
    "a number, caught": catches(lambda x: int(x.shape[0]) == 6),
    "a count, caught": catches(lambda x: sum(1 for _ in range(x.shape[0])) == 6),
    "words": lambda x: 2.0 if str(x.shape[0]) == "6" else 1.0,
    "a table of words": lambda x: {"torch.Size([6, 4])": 2.0}.get(str(x.shape), 1.0),
    "a copy, caught": catches(lambda x: bool(copy.deepcopy(x).max() > 2)),
}


@pytest.mark.parametrize("asks", ASKED.values(), ids=ASKED)
def test_what_a_forward_asks_of_its_input_is_asked_in_each_run(asks):
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) * asks(x)

    model, x = Asks().eval(), x_of()
    stats = forged_fx.calibrate(model, [x[:3] / 100, x])  # an audit, of the first, sees nothing
    forged = forged_fx.transform(model, stats, 0)
    assert not is_whole(forged)
    for one in (x, x / 100, -x, x[:3]):
        assert torch.equal(forged(one), model(one))


class Named(OrderedDict):
    """A class of results, as libraries have them."""


torch.utils._pytree.register_pytree_node(
    Named, lambda d: (list(d.values()), list(d)), lambda values, keys: Named(zip(keys, values, strict=True))
)


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 4), kind

    def forward(self, x):
        return [self.kind([("out", self.fc(x)), ("features", {"x": x})])]


@pytest.mark.parametrize(("kind", "whole"), [(dict, True), (OrderedDict, True), (Named, False)])
def test_results_are_in_containers_of_the_models_own(kind, whole, tmp_path):
    model, x = Returns(kind).eval(), x_of()
    stats = forged_fx.calibrate(model, [x])
    stats.save(tmp_path / "stats.safetensors")
    forged = forged_fx.transform(model, stats, 0)
    with pytest.warns(UserWarning, match="without an audit"):
        from_file = forged_fx.transform(model, tmp_path / "stats.safetensors", 0)
    again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(forged))))
    for one in (forged, from_file, again, copy.deepcopy(forged)):
        (found,) = one(x)
        assert is_whole(one) is whole and type(found) is kind and [*found] == ["out", "features"]
        assert torch.equal(found["out"], model(x)[0]["out"])


def test_an_audit_looks_at_the_containers_too():
    x = x_of()
    same = [{"a": x}, (x, [x])], [{"a": x}, (x, [x])]
    assert audit.same(*same) and audit.alike(*same)
    for a, b in (({"a": x}, OrderedDict(a=x)), ((x,), [x]), ({"a": x}, {"b": x}), ([x, [x]], [[x], x])):
        assert not audit.same(a, b) and not audit.alike(a, b)


def forward_of(kind):
    """A model of one layer, whose forward that is."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pre, self.fc, self.kept = nn.Identity(), nn.Linear(4, 4), {}
            self.pre.register_forward_hook(self.keep)

        def keep(self, module, args, out):
            self.kept["x"] = out

        forward = kind

    torch.manual_seed(0)
    return Model().eval()


def makes_a_class(self, x):
    result = namedtuple("Result", ["a", "b"])
    return result(self.fc(x), x)


def makes_a_message(self, x):
    torch._assert(x.shape[1] == 4, f"of shape {x.shape}")
    return self.fc(x)


@pytest.mark.parametrize("forward", [makes_a_class, makes_a_message])
def test_what_is_the_same_in_each_run_is_a_graph(forward):
    model, x = forward_of(forward), x_of()
    forged = forged_at_zero(model)
    assert is_whole(forged) and audit.same(forged(x), model(x))


def reads_what_a_hook_kept(self, x):
    return self.fc(self.pre(x)) + self.kept["x"]


def makes_a_deep_copy(self, x):
    return self.fc(copy.deepcopy(x))


def sets_data(self, x):
    self.fc.weight.data = self.fc.weight.data.clamp(-0.1, 0.1)
    return self.fc(x)


def prints(self, x):
    print(x.shape)
    return self.fc(x)


@pytest.mark.parametrize("forward", [reads_what_a_hook_kept, makes_a_deep_copy, sets_data, prints])
def test_what_is_another_in_each_run_is_no_graph(forward, capsys):
    model = forward_of(forward)
    forged = forged_at_zero(model)
    assert not is_whole(forged)
    with torch.no_grad():
        for one in (model, forged):
            one.fc.weight.copy_(torch.eye(4))
    capsys.readouterr()
    assert torch.equal(forged(x_of(2)), model(x_of(2)))
    assert capsys.readouterr().out == "torch.Size([6, 4])\n" * 2 * (forward is prints)


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x), torch.zeros(()), torch.zeros(()).to(x.device)


def test_what_a_caller_does_to_a_result_is_in_no_later_run():
    model, x = Losses().eval(), x_of()
    forged = forged_at_zero(model)
    assert is_whole(forged)
    for one in (forged, pickle.loads(pickle.dumps(forged))):
        for _ in range(2):
            y, *losses = one(x)
            assert losses == [0, 0]
            for loss in losses:
                loss += y.sum()


def test_a_graph_asks_for_an_argument_of_which_it_was_asked_only_whether_it_is_there():
    model, x = forward_of(lambda self, x, flag=None: self.fc(x) * (1 if flag is None else 2)), x_of()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [{"x": x, "flag": False}]), 0)
    assert is_whole(forged) and torch.equal(forged(x, False), model(x, False))
    with pytest.raises(AssertionError, match="calibration gave 'flag'"):
        forged(x)


def test_a_graph_of_numbers_asks_for_no_argument_that_changes_nothing():
    model, x = forward_of(lambda self, x, flag=None: self.fc(x * torch.tensor(2.0))), x_of()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [{"x": x, "flag": torch.ones(1)}]), 0)
    assert is_whole(forged) and torch.equal(forged(x), model(x))


@dataclasses.dataclass
class Result:
    out: torch.Tensor


def test_an_audit_looks_into_what_pytorch_does_not_know():
    x = x_of()
    assert audit.same(Result(x), Result(x.clone())) and not audit.same(Result(x), Result(x + 1))
    assert audit.same(UserDict(a=x), UserDict(a=x)) and not audit.same(UserDict(a=x), UserDict(a=-x))
