"""Everything is left as it was found, and an error says what to do."""

import random
import sys
import warnings

import numpy as np
import planted
import pytest
import torch
from planted import Hidden, evaluate, inputs, linear
from pyautoattack import checks
from stopped import stop_after
from torch import nn

import forged_fx
from forged_fx.evaluate import protocol, scale
from forged_fx.evaluate.gradients import Logits

pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.fixture
def small():
    return planted.small()


@pytest.fixture
def hurried(monkeypatch):
    planted.hurry(monkeypatch)


# --- everything is left as it was found ---


class Counting(nn.Module):
    """Writes into a buffer, and replaces another one, in every forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("runs", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        self.runs += 1
        self.mean = x.detach().mean(0, keepdim=True)
        return self.model(x)


def test_buffers_are_what_they_were(small, hurried):
    trained, x, y = small
    base = Counting(trained).eval()
    stats = forged_fx.calibrate(base, [x])
    forged = forged_fx.transform(base, stats, 2**-4)
    models = {"base": base, "forged": forged}
    before = {name: (model.runs, model.mean) for name, model in models.items()}
    calls = {
        "evaluate": lambda: evaluate(forged, base, x=x[:12], y=y[:12], attacks=["apgd-ce"]),
        "sweep": lambda: forged_fx.sweep(
            base, stats, x[:12], y[:12], eps=0.1, ratios=[0.1], kinds=["hard"], attacks=["apgd-ce"], rounds=1
        ),
        "sparsity": lambda: forged_fx.sparsity(forged, [x]),
        "lipschitz": lambda: forged_fx.lipschitz(base, forged, x[:4], eps=0.1),
        "cost": lambda: forged_fx.cost(forged, (x,)),
    }
    for call, run in calls.items():
        run()
        for name, model in models.items():
            runs, mean = before[name]
            assert model.runs is runs and runs == 0 and model.mean is mean, f"{call}: {name}"


def test_caller_finds_everything_as_it_was(small, hurried):
    trained, x, y = small
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), *trained)
    base = Hidden(trained)
    model.train()
    model[0].eval()
    model[2].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    model[4].register_forward_hook(lambda module, args, out: out)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    asked = [p.requires_grad for p in model.parameters()]
    x_before, y_before = x.clone(), y.clone()

    def trace(frame, event, arg):
        return None

    old_trace, counts = sys.gettrace(), dict(checks.funcs)
    generator, python = torch.get_rng_state(), random.getstate()
    sys.settrace(trace)
    try:
        with pytest.warns(UserWarning, match="train mode"):
            result = evaluate(model, base, x=x[:12], y=y[:12], attacks=["apgd-ce", "apgd-t", "fab-t"])
        assert sys.gettrace() is trace
    finally:
        sys.settrace(old_trace)
    assert checks.funcs == counts
    assert torch.equal(torch.get_rng_state(), generator) and random.getstate() == python
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == asked
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))
    assert sum(p.grad is not None for p in {*model.parameters(), *trained.parameters()}) == 1
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 1
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(x, x_before) and torch.equal(y, y_before)
    assert torch.is_grad_enabled() and result.notes == ["the model was in train mode; judged in eval mode"]


def test_handed_back_after_an_error(small):
    model, x, y = small
    model = nn.Sequential(*model).train()

    def fail(module, args):
        if not torch.is_grad_enabled():
            return
        raise RuntimeError("no memory")

    model[0].register_forward_pre_hook(fail)
    generator = torch.get_rng_state()
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="no memory"):
        warnings.simplefilter("ignore")
        evaluate(model, x=x, y=y, attacks="quick")
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_grad_mode_does_not_matter(small, hurried, mode):
    model, x, y = small
    outside = evaluate(model, x=x[:15], y=y[:15], attacks=["apgd-ce"])
    with mode():
        inside = evaluate(model, x=x[:15].clone(), y=y[:15].clone(), attacks=["apgd-ce"])
        assert not torch.is_grad_enabled()
    assert torch.equal(outside.model.broken_by, inside.model.broken_by)
    assert torch.equal(outside.model.examples, inside.model.examples)


def test_the_seed_determines_the_result(small):
    model, x, y = small
    torch.manual_seed(1)
    first = evaluate(model, x=x, y=y, attacks=["apgd-ce"], seed=3)
    torch.manual_seed(2)
    again, other = (evaluate(model, x=x, y=y, attacks=["apgd-ce"], seed=seed) for seed in (3, 4))
    assert torch.equal(first.model.examples, again.model.examples)
    assert not (
        first.model.examples.shape == other.model.examples.shape
        and torch.equal(first.model.examples, other.model.examples)
    )


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "images that were (n, height, width, channels)": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "a part of wider ones": lambda x: nn.functional.pad(x, (1, 1))[..., 1:-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm, eps", [("Linf", 0.1), ("L2", 0.5), ("L1", 3.0)])
def test_the_layout_of_the_inputs_in_memory_does_not_matter(hurried, layout, norm, eps):
    model, x = linear(4, shape=(3, 8, 8)), inputs(6, (3, 8, 8))
    call = {"y": model(x).argmax(1), "eps": eps, "norm": norm}
    there = LAYOUTS[layout](x)
    assert torch.equal(there, x) and not there.is_contiguous()
    expected, found = (evaluate(model, x=one, **call) for one in (x, there))
    assert torch.equal(found.model.broken_by, expected.model.broken_by) and len(found.model.broken)
    assert torch.equal(found.model.examples, expected.model.examples)


class InPlace(nn.Module):
    """Its first operation writes into what it is given."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.sub_(0.1).relu_())


class OutOfPlace(InPlace):
    def forward(self, x):
        return self.model((x - 0.1).relu())


def test_a_model_may_write_into_its_input(small, hurried):
    trained, x, y = small
    x, y = x[:12], y[:12]
    before = x.clone()
    model, same = InPlace(trained).eval(), OutOfPlace(trained).eval()
    plans = {"attacks": ["apgd-ce", "fab-t", "square", "mi-fgsm"]}, {"attacks": ["apgd-restart-borrowed"]}
    for plan in plans:
        found, expected = (evaluate(one, trained, x=x, y=y, **plan) for one in (model, same))
        assert torch.equal(found.model.broken_by, expected.model.broken_by) and len(found.model.broken)
    examples = found.model.examples.clone()
    found.verify(model, x, y, trained)
    assert torch.equal(found.model.examples, examples)
    call = {"eps": 0.1, "attacks": ["apgd-ce"]}
    pairs = []
    for one in (model, same):
        stats = forged_fx.calibrate(one, [x])
        pairs.append(
            (
                forged_fx.sweep(one, stats, x, y, **call, ratios=[0.1], rounds=1).points[0].worst,
                [trial.margin for trial in forged_fx.search(one, stats, x, y, **call, budget=2).trials],
                scale.of(forged_fx.transform(one, stats, 0.1), x, 5),
            )
        )
    assert pairs[0] == pairs[1] and torch.equal(x, before)


DRAWS = {
    "torch": lambda shape: torch.randn(shape),
    "numpy": lambda shape: torch.from_numpy(np.random.standard_normal(shape)).float(),
    "python": lambda shape: torch.tensor(random.gauss(0, 1)),
}


class Noisy(nn.Module):
    def __init__(self, model, draw):
        super().__init__()
        self.model, self.draw = model, draw

    def forward(self, x):
        return self.model(x + 0.3 * self.draw(x.shape))


@pytest.mark.parametrize("source", DRAWS)
def test_a_model_that_draws_random_numbers_is_judged_from_the_seed_and_its_result_returned(
    small, hurried, tmp_path, source
):
    trained, x, y = small
    model, call = Noisy(trained, DRAWS[source]).eval(), {"x": x[:20], "y": y[:20], "attacks": ["apgd-ce"], "seed": -1}
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first, again, kept, returned = (evaluate(model, **call, folder=f) for f in (None, None, tmp_path, tmp_path))
    for other in (again, kept, returned):
        assert torch.equal(other.model.examples, first.model.examples) and other.findings == first.findings
        assert torch.equal(other.gallery.predicted, first.gallery.predicted)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert "output randomised" in [finding.name for finding in first.findings if finding.raised]
    model.draw = lambda shape: torch.tensor(1.0)  # the state is as it was, and the code another: it draws nothing
    with pytest.raises(ValueError, match=r"are classified (rightly|otherwise)"):
        evaluate(model, **call, folder=tmp_path)


def test_the_gradient_in_batches_is_that_of_the_numbers_drawn(small):
    """The backward runs the forward again, and draws what that drew; what is drawn afterwards is not moved."""
    trained, x, y = small
    model, gradients = Noisy(trained, DRAWS["torch"]).eval(), []
    for logits in (Logits(model, 8), lambda x: torch.cat([model(part) for part in x.split(8)])):
        torch.manual_seed(0)
        leaf = x[:20].clone().requires_grad_()
        loss = nn.functional.cross_entropy(logits(leaf), y[:20])
        torch.rand(1)
        before = torch.get_rng_state()
        gradients += torch.autograd.grad(loss, leaf)
        assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(*gradients)


def test_findings_do_not_depend_on_where_a_run_was_stopped(small, hurried, tmp_path, monkeypatch):
    """Nor does what is drawn when all blocks are done."""
    trained, x, y = small
    model, base = (Noisy(trained, DRAWS["torch"]).eval() for _ in range(2))
    call = {"x": x[:20], "y": y[:20], "attacks": ["apgd-ce"], "folder": tmp_path}
    first = evaluate(model, base, **call | {"folder": None})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(protocol, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate(model, base, **call)
    torch.manual_seed(5)
    again = evaluate(model, base, **call)
    assert again.findings == first.findings and torch.equal(again.gallery.predicted, first.gallery.predicted)


def test_a_model_that_draws_now_and_did_not_is_of_other_code(small, hurried, tmp_path):
    trained, x, y = small
    model, call = Noisy(trained, lambda shape: torch.zeros(shape)).eval(), {"x": x[:20], "y": y[:20]}
    evaluate(model, **call, attacks=["apgd-ce"], folder=tmp_path)
    model.draw = DRAWS["torch"]
    with pytest.raises(ValueError, match=r"are classified (rightly|otherwise)"):
        evaluate(model, **call, attacks=["apgd-ce"], folder=tmp_path)


@pytest.mark.parametrize("source", DRAWS)
def test_so_are_a_sweeps_and_a_searchs(small, hurried, tmp_path, source):
    trained, x, y = small
    model, call = Noisy(trained, DRAWS[source]).eval(), {"eps": 0.1, "attacks": ["apgd-ce"]}
    given = model, forged_fx.calibrate(model, [x]), x[:20], y[:20]
    folders = [tmp_path / name for name in ("one", "two", "two")]
    swept = [forged_fx.sweep(*given, **call, ratios=[0.1], rounds=0, folder=folder) for folder in folders]
    assert swept[0].points == swept[1].points == swept[2].points
    searched = [forged_fx.search(*given, **call, budget=2, folder=folder) for folder in folders]
    margins = [[trial.margin for trial in found.trials] for found in searched]
    assert margins[0] == margins[1] == margins[2]


def test_so_is_a_search_that_was_stopped(small, hurried, tmp_path, monkeypatch):
    trained, x, y = small
    model, call = Noisy(trained, DRAWS["torch"]).eval(), {"eps": 0.1, "attacks": ["apgd-ce"], "budget": 2}
    given = model, forged_fx.calibrate(model, [x]), x[:20], y[:20]
    whole = forged_fx.search(*given, **call)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(3, patch)
        forged_fx.search(*given, **call, folder=tmp_path)
    torch.manual_seed(5)
    again = forged_fx.search(*given, **call, folder=tmp_path)
    assert [trial.margin for trial in again.trials] == [trial.margin for trial in whole.trials]


def test_an_exported_program_is_judged_as_the_model_it_was(small, hurried):
    trained, x, y = small
    call = {"x": x[:12], "y": y[:12], "attacks": ["apgd-ce", "fab-t"]}
    expected = evaluate(trained, **call)
    program = torch.export.export(trained, (x[:4],), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    for model in (program, nn.Sequential(program, nn.Dropout(0.5))):
        flags = [module.training for module in model.modules()]
        with warnings.catch_warnings():
            warnings.simplefilter("error" if model is program else "ignore")
            found = evaluate(model, **call)
        assert torch.equal(found.model.broken_by, expected.model.broken_by)
        assert [module.training for module in model.modules()] == flags
        assert all(p.requires_grad for p in model.parameters())


class Constant(nn.Module):
    """Returns its own memory as logits. Square writes into logits, and must not write into that."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)
        self.eval()

    def forward(self, x):
        return self.logits[: len(x)]


def test_square_does_not_write_into_the_model(monkeypatch):
    planted.hurry(monkeypatch)
    logits = torch.tensor([[2.0, 1.0]] * 8)
    model = Constant(logits.clone())
    result = evaluate(model, x=inputs(8), y=torch.zeros(8, dtype=torch.int64), attacks=["square"])
    assert result.worst_case == 1 and torch.equal(model.logits, logits)


# --- what cannot be judged ---


class Tuple(nn.Identity):
    def forward(self, x):
        return (x.flatten(1),)


class Sick(nn.Identity):
    def forward(self, x):
        return x.flatten(1) * torch.nan


@torch.inference_mode()
def made_in_inference_mode():
    return linear()


X, Y = inputs(4), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": X.numpy()}, TypeError, r"must be tensors, not ndarray.*torch\.as_tensor"),
        ({"x": X[0], "y": Y[0]}, ValueError, r"x\[None\]"),
        ({"x": X.double()}, TypeError, r"x\.float\(\)"),
        ({"x": (X * 255).byte()}, TypeError, r"x\.float\(\)"),
        ({"x": X * 255}, ValueError, "outside \\[0, 1\\].*divide by 255"),
        ({"x": X / X.max() * (1 + 1e-6)}, ValueError, r"spans .*1\.00000\d+\], .*by rounding, .*x\.clamp\(0, 1\)"),
        ({"x": X - 0.5}, ValueError, "outside \\[0, 1\\].*normalisation into the model"),
        ({"x": X * torch.nan}, ValueError, "NaN"),
        ({"x": X[0, 0, 0]}, ValueError, "batch of inputs"),
        ({"x": X[:0], "y": Y[:0]}, ValueError, "batch of inputs"),
        ({"y": Y[:3]}, ValueError, "one class index per input"),
        ({"y": torch.eye(10)[:4]}, ValueError, "one class index per input"),
        ({"y": Y > 0}, TypeError, "y is torch.bool; expected class indices"),
        ({"y": Y.float()}, TypeError, "int64"),
        ({"y": Y + 7}, ValueError, "10 classes"),
        ({"y": Y - 1}, ValueError, "10 classes"),
        ({"eps": 0}, ValueError, "positive"),
        ({"eps": "8/255"}, TypeError, "pass a number"),
        ({"eps": float("nan")}, ValueError, "positive"),
        ({"eps": 8}, ValueError, "8/255"),
        ({"norm": "linf"}, ValueError, "Linf, L2, L1"),
        ({"attacks": "rand"}, ValueError, "'quick' or 'standard' or 'thorough'"),
        ({"attacks": ["apgd-ce", "pgd"]}, ValueError, "unknown 'pgd'"),
        ({"attacks": []}, ValueError, "none named"),
        ({"batch_size": 0}, ValueError, "at least 1"),
        ({"model": Tuple().eval()}, TypeError, "the model returns tuple"),
        ({"model": nn.Identity().eval()}, ValueError, "expected \\(n, classes\\)"),
        ({"model": Sick().eval()}, ValueError, "NaN or infinite logits"),
        ({"model": lambda x: x}, TypeError, "the model is function; .*nn.Module"),
        ({"model": made_in_inference_mode()}, ValueError, r"inference_mode.* pass copy\.deepcopy\(model\)"),
        ({"bpda": forged_fx.straight_through()}, TypeError, "bpda is .*; pass what makes a context manager, uncalled"),
        ({"bpda": "straight_through"}, TypeError, "bpda is 'straight_through'; pass what makes"),
        (
            {"model": linear().half()},
            TypeError,
            r"the model has torch.float16 weights .* pass model.to\(torch.float32\)",
        ),
        ({"base": linear().double()}, TypeError, "the base has torch.float64 weights and does not take torch.float32"),
        ({"base": linear().to("meta")}, ValueError, "the base is on the meta device"),
        ({"folder": __file__}, FileExistsError, "is a file"),
        ({"base": linear(3)}, ValueError, "the base has 3 classes, the model 10"),
    ],
)
def test_errors_name_what_is_wrong(change, error, words):
    call = {"model": linear(), "base": linear(), "x": X, "y": Y, "eps": 0.1, "attacks": "quick"} | change
    with pytest.raises(error, match=words):
        evaluate(call.pop("model"), call.pop("base"), **call)


def test_another_default_dtype_is_named(small):
    model, x, y = small
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(TypeError, match=r"default dtype is torch.float64.* torch.set_default_dtype"):
            evaluate(model, x=x, y=y)
    finally:
        torch.set_default_dtype(torch.float32)


def test_missing_packages_are_named(small, monkeypatch):
    model, x, y = small
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"needs pyautoattack .*in a checkout .*, pip install \"\.\[eval\]\""):
        evaluate(model, x=x, y=y)


def test_a_bpda_that_makes_no_context_is_named():
    with pytest.raises(TypeError, match="bpda makes None; pass what makes a context manager"):
        evaluate(planted.linear(), x=planted.inputs(6), y=torch.zeros(6, dtype=torch.int64), bpda=lambda: None)


def test_an_empty_folder_name_is_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="names no folder"):
        evaluate(planted.linear(), x=planted.inputs(6), y=torch.zeros(6, dtype=torch.int64), folder="")
    assert not list(tmp_path.iterdir())


def test_shard_is_yes_or_no():
    with pytest.raises(TypeError, match="shard='no'"):
        evaluate(planted.linear(), x=planted.inputs(6), y=torch.zeros(6, dtype=torch.int64), shard="no")


def test_an_input_that_a_model_fails_on_is_named():
    y = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"\(6, 1, 5, 5\).*cannot be multiplied.*resize") as caught:
        evaluate(planted.linear(), x=planted.inputs(6, (1, 5, 5)), y=y)
    assert "cannot be multiplied" in str(caught.value.__cause__)
    fixed = torch.export.export(planted.linear(), (planted.inputs(4),)).module()
    with pytest.raises(RuntimeError, match=r"\(6, 1, 6, 6\).*dynamic_shapes"):
        evaluate(fixed, x=planted.inputs(6), y=y)


def test_a_frozen_script_is_refused():
    script = torch.jit.freeze(torch.jit.trace(planted.linear(), planted.inputs(2)))
    with pytest.raises(ValueError, match="frozen by"):
        evaluate(script, x=planted.inputs(6), y=torch.zeros(6, dtype=torch.int64))


def test_inputs_may_be_those_that_a_gradient_was_asked_of():
    base, x = linear(classes=3), inputs(6)
    y = base(x).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = forged_fx.evaluate(base, x=x.clone().requires_grad_(), y=y, eps=0.1, attacks=["apgd-ce"])
    assert result.n == 6
