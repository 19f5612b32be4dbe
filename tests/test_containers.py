"""A forged graph holds what the model holds, in its order; what does not run in it says so, and runs on request."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

import forged_fx
from forged_fx.thresholds import thresholds_of
from forged_fx.transform import ForgedModule, forging_of


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Net(nn.Module):
    """Defined in another order than it runs, with weights of every origin, and some that do not run at all."""

    def __init__(self):
        super().__init__()
        self.head, self.unused, self.act = nn.Linear(6, 3), nn.Linear(2, 2), nn.ReLU()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.twin = self.blocks[0]
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.blocks[1].first.weight
        self.scales = nn.ParameterList([torch.ones(6), torch.full((6,), 2.0)])
        self.shift, self.constant = nn.Parameter(torch.ones(6)), torch.tensor(0.5)
        self.register_buffer("mean", torch.zeros(6), persistent=False)
        self.register_parameter("none", None)

    def forward(self, x):
        x = self.tied(x - self.mean) * self.scales[1] + self.shift
        for block in reversed(self.blocks):
            x = x + block(x) * self.constant
        return self.head(self.act(x))


class Indexed(nn.Module):
    def __init__(self, named):
        super().__init__()
        self.named = named

    def forward(self, x):
        x = self.named["body"](x)
        return sum(head(x) for head in self.named["heads"])


class Backwards(nn.Sequential):
    def __getitem__(self, index):
        return super().__getitem__(-1 - index)


@pytest.fixture
def x():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def stats(model, x):
    return forged_fx.calibrate(model, [x])


def held(model):
    """The names of everything in a model, in order, but for what forging added."""
    kinds = model.named_parameters(), model.named_buffers(), model.named_modules(), model.state_dict().items()
    of_modules = model.named_parameters(remove_duplicate=False), model.named_modules(remove_duplicate=False)
    return [[name for name, _ in kind if "forged" not in name] for kind in (*kinds, *of_modules)]


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def without_constant(names):
    return [[name for name in kind if name != "constant"] for kind in names]


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, copy.copy, pickled, lambda m: copy.deepcopy(pickled(m))])
@pytest.mark.parametrize("given", [{}, {"include": "blocks.1.*"}, {"exclude": "head"}], ids=str)
def test_the_order_is_the_models(how, given, model, stats, x):
    forged = forged_fx.transform(model, stats, 2**-4, **given)
    twin = how(forged)
    assert isinstance(twin, ForgedModule)
    assert without_constant(held(twin)) == held(model)  # (which the graph reads, and is in no checkpoint)
    assert twin.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(twin(x), forged(x)) and not torch.equal(twin(x), model(x))
    assert [type(m) for m in twin.parameters()] == [type(m) for m in model.parameters()]
    assert twin.tied.weight is twin.get_parameter("blocks.1.first.weight") and twin.twin is twin.get_submodule(
        "blocks.0"
    )


def test_what_goes_by_the_order_gives_each_weight_its_own(model, stats, x):
    forged = forged_fx.transform(model, stats, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).square().mean().backward()
    optimizer.step()
    after = torch.optim.SGD(forged.parameters(), lr=0.1, momentum=0.9)
    after.load_state_dict(optimizer.state_dict())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = optimizer.state[parameter]["momentum_buffer"]
            assert torch.equal(after.state[forged.get_parameter(name)]["momentum_buffer"], expected)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), forged.parameters())
    assert torch.equal(forged(x), model(x))


def test_a_mode_that_is_set_apart_is_kept(model, stats):
    model.train()
    model.blocks[1].eval()
    for twin in (forged := forged_fx.transform(model, stats), copy.deepcopy(forged), pickled(forged)):
        assert [m.training for m in twin.modules()] == [m.training for m in model.modules()]


HOOKS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]


@pytest.mark.parametrize("made", [lambda m: m, copy.deepcopy, pickled])
def test_who_counts_on_the_running_of_what_does_not_run_is_told(made, model, stats, x):
    forged = made(forged_fx.transform(model, stats))
    block, told = forged.get_submodule("blocks.1"), r"'blocks.1' does not run in this forged model.*graph=False"
    for use in (lambda: block(x), lambda: setattr(block, "forward", print)):
        with pytest.raises(RuntimeError, match=told):
            use()
    for kind in HOOKS:
        with pytest.warns(UserWarning, match=told):
            getattr(block, f"register_{kind}_hook")(pytest.fail)
    with pytest.warns(UserWarning, match=told):
        block.compile()
    with pytest.warns(UserWarning, match=told):
        forged.blocks[1] = wrapped = checkpoint_wrapper.checkpoint_wrapper(block)
    assert forged.blocks[1] is wrapped and torch.equal(forged(x), forged_fx.transform(model, stats)(x))
    seen = []
    for name in ("", "blocks.1.first", "act"):  # the model and the layers do
        forged.get_submodule(name).register_forward_hook(lambda *_: seen.append(0))
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(0)):
        forged.apply(lambda module: None).to(torch.float64)(x.double())
    assert len(seen) == 3 + 8


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.temperature, self.config = nn.Linear(6, 3), 2.0, {"mean": (0.5, 0.5), "names": ["a"]}
        self.kept = [torch.zeros(1)]

    def forward(self, x):
        return self.fc(x) / self.temperature


@pytest.mark.parametrize("made", [lambda m: m, copy.deepcopy, copy.copy, pickled])
def test_attributes_can_be_read_and_who_sets_one_is_told(made, x):
    model = nn.Sequential(Tempered(), nn.ReLU()).eval()
    model.name = "net"
    forged = made(forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-4))
    assert (forged.name, forged[0].temperature, forged[0].config) == ("net", 2.0, model[0].config)
    assert not hasattr(forged[0], "kept")  # tensors are where a state dict shows them
    before = forged(x)
    for module, attribute in ((forged[0], "temperature"), (forged, "name")):
        with pytest.warns(UserWarning, match=f"setting '{attribute}' changes nothing.*graph=False"):
            setattr(module, attribute, 4.0)
        assert getattr(module, attribute) == 4.0
    assert torch.equal(forged(x), before)
    forged.note = forged[0].note = "a user's own"
    forged.note = forged[0].note = "and again"
    modules = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-4, graph=False)
    modules[0].temperature = 4.0
    assert torch.equal(modules(x), before / 2)


@pytest.mark.parametrize("kind", ["hard", "clamp"])
def test_module_by_module_on_request(kind, model, stats, x):
    ratio = {"hard": 2**-3, "clamp": 0.5}[kind]
    graph, modules = (forged_fx.transform(model, stats, ratio, kind=kind, graph=graph) for graph in (True, False))
    assert isinstance(graph, ForgedModule) and isinstance(modules, Net) and isinstance(modules.blocks[0], Block)
    assert torch.equal(modules(x), graph(x)) and not torch.equal(modules(x), model(x))
    assert list(forging_of(modules).reached) == list(forging_of(graph).reached)
    assert "module by module (as graph=False asked for)" in str(forged_fx.describe(modules))
    forged_fx.set_ratio(modules, None)
    assert torch.equal(modules(x), model(x))
    forged_fx.set_ratio(modules, ratio)
    seen = []
    modules.blocks[1].register_forward_hook(lambda *_: seen.append(0))
    wrap = checkpoint_wrapper.apply_activation_checkpointing
    wrap(modules, check_fn=lambda module: isinstance(module, Block))
    assert torch.equal(modules(x), graph(x)) and len(seen) == 1
    with pytest.raises(ValueError, match=r"graph='no': True for one graph"):
        forged_fx.transform(model, stats, graph="no")


def test_a_layer_is_replaced_by_its_index_as_in_the_model(x):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-4, exclude="1.2")
    head = forged[1][-1] = nn.Linear(6, 5)
    for twin in (forged, copy.deepcopy(forged), pickled(forged)):
        assert twin[1][2] is twin.get_submodule("1.2") and twin(x).shape == (8, 5) and len(list(twin)) == 2
    for some in (forged, forged[1]):
        with pytest.raises(TypeError, match="none can be taken out"):
            del some[0]
    assert forged[1][2] is head and forged[:1] == [forged.get_submodule("0")]
    with pytest.warns(UserWarning, match="'1' does not run in this forged model, so that what takes its place"):
        forged[1] = checkpoint_wrapper.checkpoint_wrapper(forged[1])
    with pytest.raises(TypeError, match="'ForgedBlock' object is not subscriptable"):
        forged_fx.transform(model[0], forged_fx.calibrate(model[0], [x]))[0]


@pytest.mark.parametrize("wrap", [checkpoint_wrapper.checkpoint_wrapper, torch.compile])
def test_a_layer_that_was_wrapped_since_keeps_its_threshold(wrap, model, stats, x):
    forged = forged_fx.transform(model, stats, 2**-4)
    expected, coarse = forged(x), forged_fx.transform(model, stats, 0.5)(x)
    forged.head = wrap(forged.head)
    if wrap is not torch.compile:  # (which puts its own name into those of the weights)
        forged.load_state_dict(forged.state_dict())
    assert forged.double() is forged and {b.dtype for b in thresholds_of(forged).values()} == {torch.float32}
    assert torch.equal(forged.float()(x), expected)
    forged_fx.set_ratio(forged, 0.5)
    assert torch.equal(forged(x), coarse) and not torch.equal(coarse, expected)
    described = forged_fx.describe(forged)
    assert [row.threshold for row in described] == [float(t) for t in thresholds_of(forged).values()]
    assert "saw no call of them: unused" in (said := str(described)) and "head." not in said


def test_what_can_be_indexed_in_the_model_can_be_in_its_graph(x):
    torch.manual_seed(0)
    parts = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), Block())
    named = nn.ModuleDict({"body": parts, "heads": nn.ModuleList([Block(), Block()])})
    model = Indexed(named).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-4)
    for twin in (forged, copy.deepcopy(forged), pickled(forged)):
        body, heads = twin.named["body"], twin.named["heads"]
        assert (
            list(twin.named) == ["body", "heads"] and "body" in twin.named and dict(twin.named.items())["body"] is body
        )
        assert (len(body), len(heads), len(twin.named)) == (2, 2, 2) and heads[-1] is twin.get_submodule(
            "named.heads.1"
        )
        assert list(heads) == [heads[0], heads[1]] == heads[:2] and isinstance(body[0][0], nn.Linear)
        assert list(twin.named.keys()) == ["body", "heads"] and list(twin.named.values()) == [body, heads]
        assert torch.equal(twin(x), forged(x))
    with pytest.raises(TypeError, match="not subscriptable"):
        heads[0][0]


def test_what_is_indexed_in_a_way_of_its_own_is_not_indexed_otherwise(x):
    model = nn.ModuleDict(
        {"body": Backwards(nn.Linear(6, 6), nn.Linear(6, 6)), "heads": nn.ModuleList([nn.Identity()])}
    )
    model = Indexed(model).eval()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-4)
    with pytest.raises(TypeError, match="not subscriptable"):
        forged.named["body"][0]
