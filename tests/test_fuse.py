"""transform(fuse=True): which producers join their threshold, and that nothing else changes."""

import copy
import io
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from interpreted import arithmetic_of_a_gpu, kernels  # noqa: F401 (a fixture)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import forged_fx
from forged_fx import fused_ops
from forged_fx.audit import alike
from forged_fx.fuse import producer_threshold
from forged_fx.kinds import KINDS
from forged_fx.models import is_as_its_class
from forged_fx.thresholds import thresholds_of
from forged_fx.transform import ForgedModule

RATIO = 2**-3


class Net(nn.Module):
    """Two convolutions with `between` in the middle. Its layers are there for it to use, or not."""

    def __init__(self, between: Callable) -> None:
        super().__init__()
        self.between = between
        self.first, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.bn, self.relu, self.relu_, self.gelu = nn.BatchNorm2d(6), nn.ReLU(), nn.ReLU(inplace=True), nn.GELU("tanh")
        self.ln, self.rms, self.drop, self.same = nn.LayerNorm(8), nn.RMSNorm(8), nn.Dropout(0.5), nn.Identity()
        self.drop2, self.pool = nn.Dropout(0.5), nn.FractionalMaxPool2d(2, output_ratio=0.5)
        self.gamma = nn.Parameter(torch.full((6, 1, 1), 0.7))
        self.position = nn.Parameter(torch.randn(6, 8, 8))
        self.bn.running_mean.uniform_(-1, 1)
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self, self.first(x), self.last)


def residual_stream(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.relu(m.bn(x) + x)
    return last(y) + y


def added(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    return last(m.bn(x) + x.flip(0))


def pre_activation(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    s = x + x.flip(0)
    return last(torch.relu(m.bn(s))) + s


def sum_and_stream(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    s = x + x.flip(0)
    y = torch.relu(m.bn(s))
    return last(y) + y + s


def sum_and_strides(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    s = x.transpose(2, 3) + x.transpose(2, 3).flip(0)
    y = m.ln(s)
    return last(y) + s + y.stride(3)


def two_readers(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.bn(x)
    return last(F.relu(y)) + y


def sum_read_early(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    s = x + x.flip(0)
    r = s.exp()
    return last(m.relu(m.bn(s))) + r


def written_in_between(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = x + x.flip(0)
    x.mul_(2)
    return last(m.relu(y)) + x


def written_into_x(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    view = x.view(-1)
    return last(m.relu_(x)) + view.view_as(x)


def written_into_a_view_of_x(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    return last(m.relu_(x.view_as(x))) + x


def written_into_the_same_as_x(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    return last(m.relu_(m.same(x))) + x


def the_other_is_read(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.bn(x)
    return last(y + m.gamma * x.flip(0)) + y


def in_place_sum(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    out = m.bn(x)
    out += x
    return last(m.relu_(out))


def read_between(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.relu(x)
    r = y.exp()
    return last(m.same(y)) + r


def shape_read(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.gelu(m.bn(x))
    return last(y) + y.shape[1] + y.size(2)


def shape_read_between(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.bn(x)
    n = y.shape[1]
    return last(m.gelu(y)) + n


def windows(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    """Four windows, shifted and padded, as a Swin transformer cuts them."""
    y = m.drop(m.ln(x))
    n, c, h, w = y.shape
    y = F.pad(torch.roll(y, (1, 2), (2, 3)), (0, 0, 0, h % 2))
    y = y.view(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).contiguous()
    return last(y.view(-1, c, h // 2, w // 2))


def drawn_in_between(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y, z = m.drop(x), m.drop2(x)
    return last(m.relu(y)) + z


def run_twice_in_train_mode(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y, z = m.bn(x), m.bn(2 * x)
    return last(m.relu(y)) + z


def shape_read_ahead_of_a_sum(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.bn(x[:1])
    return last(m.relu(y + x)) * y.shape[0]


def written_with_a_method(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = x + x.flip(0)
    x.__imul__(2)
    return last(m.relu(y)) + x


def written_with_an_operator(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = x + x.flip(0)
    torch.ops.aten.mul_.Tensor(x, x)
    return last(m.relu(y)) + x


@torch.fx.wrap
def halve(x: Tensor) -> Tensor:
    return x.mul_(0.5)


def written_by_who_knows_what(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.bn(x)
    z = halve(x)
    return last(m.relu(y)) + z


@torch.library.custom_op("forged_fx_tests::halve", mutates_args=("x",))
def halve_by_an_operator(x: Tensor) -> None:
    x.mul_(0.5)


def written_by_any_operator(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.bn(x)
    torch.ops.forged_fx_tests.halve(x)
    return last(m.relu(y)) + x


def written_by_one(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.bn(x)
    F.relu(x, inplace=1)
    return last(m.gelu(y)) + x


def drawn_by_a_pooling(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.drop(x)
    z = m.pool(x)
    return last(m.relu(y))[..., :2, :2] + z[..., :2, :2]


def written_where_it_moved_from(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = x.relu_().transpose(2, 3)
    x.mul_(2)
    return last(y)


def of_another_layout(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    r = x.contiguous()
    y = r + m.bn(x.contiguous(memory_format=torch.channels_last))
    return last(y) + y.view(y.shape[0], -1).sum()


def many_sums(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = x
    for _ in range(400):
        y = y + x
    return last(y)


def moved_and_read(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.gelu(x).roll(1, 2)
    return last(y) + y


def moved_and_read_above(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.gelu(x)
    return last(y.flip(2)) + y


def moved_and_written_later(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.gelu(x)
    z = last(y.flip(2))
    return z + y.mul_(2)


def moved_and_written(m: Net, x: Tensor, last: nn.Module) -> Tensor:
    y = m.gelu(x)
    y.view(-1).mul_(2)
    return last(y.transpose(2, 3))


# What is between the convolutions -> what its kernel computes besides the threshold (None: the site is not fused).
CASES: dict[str, tuple[Callable, str | None]] = {
    "bn": (lambda m, x, last: last(m.bn(x)), "BatchNorm2d"),
    "bn, relu": (lambda m, x, last: last(m.relu_(m.bn(x))), "BatchNorm2d + ReLU"),
    "with identities": (lambda m, x, last: last(m.drop(m.relu_(m.same(m.bn(x))))), "BatchNorm2d + ReLU"),
    "functional": (lambda m, x, last: last(F.relu(m.bn(x), inplace=True)), "BatchNorm2d + relu"),
    "method": (lambda m, x, last: last(m.bn(x).relu_()), "BatchNorm2d + relu"),
    "gelu": (lambda m, x, last: last(F.gelu(m.gelu(x))), "gelu"),
    "residual": (lambda m, x, last: last(m.gelu(x + m.bn(x))), "BatchNorm2d + add + GELU"),
    "residual in place": (in_place_sum, "BatchNorm2d + add + ReLU"),
    "residual in place, of a norm": (lambda m, x, last: last(m.relu(m.ln(x).add_(m.bn(x)))), "add + ReLU"),
    "residual stream": (residual_stream, "BatchNorm2d + add + ReLU"),
    "sum that is read": (lambda m, x, last: last(s := m.bn(x) + x) + s, "BatchNorm2d + add"),
    "pre-activation": (pre_activation, "add + BatchNorm2d + relu"),
    "sum and strides": (sum_and_strides, "add + LayerNorm"),
    "sum and stream": (sum_and_stream, "BatchNorm2d + relu"),
    "layer scale": (lambda m, x, last: last(m.gamma * x + x.flip(0)), "mul + add"),
    "scaled, the other operand read": (the_other_is_read, "mul + add"),
    "reshaped scale": (lambda m, x, last: last(F.silu(x.mul(m.gamma.reshape(1, -1, 1, 1)))), "mul + silu"),
    "bias": (lambda m, x, last: last(F.relu6(x + m.gamma)), "add + relu6"),
    "layer norm": (lambda m, x, last: last(m.ln(x)), "LayerNorm"),
    "residual, rms norm": (lambda m, x, last: last(m.rms(s := x + x.flip(0))) + s, "add + RMSNorm"),
    "functional norm": (lambda m, x, last: last(F.layer_norm(x, (8, 8), eps=1e-4)), "layer_norm"),
    "relu alone": (two_readers, "relu"),
    "sum is needed early": (sum_read_early, "BatchNorm2d + ReLU"),
    "added behind the norm": (lambda m, x, last: last(m.ln(x) + x), "add"),
    "written in between": (written_in_between, "ReLU"),
    "read in between": (read_between, None),
    "its shape is read": (shape_read, "BatchNorm2d + GELU"),
    "its shape is read in between": (shape_read_between, "GELU"),
    "windows": (windows, "LayerNorm"),
    "moved": (lambda m, x, last: last(m.gelu(x).flatten(2).unflatten(2, (8, 8)).transpose(2, 3)), "GELU"),
    "moved, read": (moved_and_read, None),
    "moved, read above": (moved_and_read_above, None),
    "moved, written later": (moved_and_written_later, None),
    "moved, written": (moved_and_written, None),
    "padded with ones": (lambda m, x, last: last(F.pad(m.gelu(x), (1, 1), value=1.0)), None),
    "reflected": (lambda m, x, last: last(F.pad(m.gelu(x), (1, 1, 0, 0), "reflect")), None),
    "selected": (lambda m, x, last: last(m.gelu(x)[:, :, 1:]), None),
    "run again in between": (run_twice_in_train_mode, "ReLU"),
    "written with a method": (written_with_a_method, "ReLU"),
    "nothing": (lambda m, x, last: last(x), None),
    "unknown": (lambda m, x, last: last(x.sigmoid()), None),
    "no parameter per channel": (lambda m, x, last: last(x * m.position), None),
    "two activations": (lambda m, x, last: last(x * x.flip(0)), None),
    "alpha": (lambda m, x, last: last(torch.add(x, x.flip(0), alpha=2)), None),
    "written into what others read": (written_into_x, None),
}


# What may look like a chain, and has to run one by one, or not to be moved.
LOOKALIKES: dict[str, Callable] = {
    "a sum with a number": lambda m, x, last: last(m.relu(x + x.shape[1])),
    "a number with a sum": lambda m, x, last: last(x.shape[1] + x),
    "a sum with itself": lambda m, x, last: last((y := m.bn(x)) + y),
    "a bias behind a BatchNorm": lambda m, x, last: last(m.bn(x) + m.gamma),
    "a bias ahead of a scale": lambda m, x, last: last((x + m.gamma) * m.gamma),
    "a bias ahead of a BatchNorm": lambda m, x, last: last(m.bn(x + m.gamma)),
    "a bias ahead of an RMSNorm": lambda m, x, last: last(m.rms(x + m.gamma)),
    "along two dimensions": lambda m, x, last: last(x * m.gamma + m.ln.weight),
    "written into a view": written_into_a_view_of_x,
    "written into the same": written_into_the_same_as_x,
    "of two dtypes": lambda m, x, last: last(x + x.flip(0).half()),
    "stretched": lambda m, x, last: last(x[:, :1] + m.gamma),
    "times a number": lambda m, x, last: last(torch.add(x, x.flip(0), alpha=2)),
    "drawn in between": drawn_in_between,
    "its shape is read ahead of a sum": shape_read_ahead_of_a_sum,
    "written with an operator": written_with_an_operator,
    "written by who knows what": written_by_who_knows_what,
    "written by any operator": written_by_any_operator,
    "written by one": written_by_one,
    "drawn by a pooling": drawn_by_a_pooling,
    "moved, then written": written_where_it_moved_from,
    "of another layout": of_another_layout,
    "many sums": many_sums,
    "other bits": lambda m, x, last: last(torch.relu(x.double()).view(torch.float32)),
    "other bits, as another's": lambda m, x, last: last(torch.relu(x.double()).view(x.dtype)),
}


class Counted(TorchDispatchMode):
    """Which of the library's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "forged_fx":
            self.ran[str(function).split(".")[1]] += 1
        return function(*args, **(kwargs or {}))


def ran(forged: nn.Module, x: Tensor) -> dict[str, int]:
    with torch.no_grad(), Counted() as counted:
        forged(x)
    return dict(counted.ran)


def pair(between: Callable, ratio: object = RATIO, **more: str) -> tuple[ForgedModule, ForgedModule, Tensor]:
    """The same model, forged without and with fusion, and an input."""
    torch.manual_seed(0)
    model, x = Net(between).eval(), torch.randn(4, 3, 8, 8)
    stats = forged_fx.calibrate(model, [x])
    plain, fused = (forged_fx.transform(model, stats, ratio, fuse=fuse, **more) for fuse in (False, True))
    return plain, fused, x


@pytest.fixture
def resnet() -> tuple[ForgedModule, ForgedModule, Tensor]:
    return pair(residual_stream)


@pytest.mark.parametrize("name", CASES)
def test_fused_is_unfused(name: str) -> None:
    between, expected = CASES[name]
    plain, fused, x = pair(between)
    assert isinstance(fused, ForgedModule)
    reached = {row.site: row.reached for row in forged_fx.describe(fused)}
    together = "" if expected is None else f", in one call with {expected}"
    assert reached == {"first": "in the graph", "last": "in the graph" + together}
    kernel = "norm_threshold" if "orm" in (expected or "").replace("BatchNorm", "") else "elementwise_threshold"
    assert all(node.users for node in fused.graph.nodes if node.op == "get_attr"), "what is not needed is not looked up"
    assert ran(fused, x) == ({"threshold": 2} if expected is None else {"threshold": 1, kernel: 1})
    assert fused.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(fused(x), plain(x))
    for mode in (torch.enable_grad, forged_fx.straight_through):
        grads = []
        for model in (plain, fused):
            leaf = x.clone().requires_grad_()
            with mode():
                grads.append(torch.autograd.grad(model(leaf).sin().sum(), [leaf, *model.first.parameters()]))
        assert all(map(torch.equal, *grads))
    fused.train(), plain.train()
    torch.manual_seed(1)
    result = fused(x)
    torch.manual_seed(1)
    assert torch.equal(result, plain(x))
    assert all(torch.equal(a, b) for a, b in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True))
    fused.eval(), plain.eval()
    assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", LOOKALIKES)
def test_what_looks_like_a_chain(name: str, batch: int) -> None:
    """The model was calibrated on another batch, and there is none to audit it with."""
    torch.manual_seed(0)
    model, x = Net(LOOKALIKES[name]).eval(), torch.randn(4, 3, 8, 8)
    stats = forged_fx.calibrate(model, [x[:batch]])
    stats.example = None
    plain, fused = (forged_fx.transform(model, stats, RATIO, fuse=fuse) for fuse in (False, True))
    for training in (False, True):
        results = []
        for forged in (plain, fused):
            forged.train(training)
            torch.manual_seed(1)
            with torch.no_grad():
                results.append(forged(x))
        assert torch.equal(*results), training


def test_a_shape_that_is_read_is_not_the_value() -> None:
    """Nothing is written for it."""
    _, fused, _ = pair(shape_read)
    calls = [node for node in fused.graph.nodes if node.target is producer_threshold]
    assert [node.args[3] for node in calls] == [None]


def test_the_norms_of_transformers() -> None:
    """Attention asks for the shape of its input, and a Swin transformer cuts it into windows."""
    timm = pytest.importorskip("timm")
    small = {"img_size": 56, "embed_dim": 24, "num_classes": 2}
    vit = timm.models.VisionTransformer(**small, patch_size=14, depth=2, num_heads=2)
    swin = timm.models.SwinTransformer(**small, depths=(2,), num_heads=(2,), window_size=7)
    for model, block, shortcut in ((vit, "blocks.1", "add + "), (swin, "layers.0.blocks.1", "")):
        x = torch.rand(1, 3, 56, 56)
        forged = forged_fx.transform(model.eval(), forged_fx.calibrate(model, [x]), fuse=True)
        reached = {row.site: row.reached for row in forged_fx.describe(forged)}
        assert reached[f"{block}.attn.qkv"].endswith(f"with {shortcut}LayerNorm"), reached
        assert reached[f"{block}.mlp.fc1"].endswith("LayerNorm"), reached
        assert reached[f"{block}.mlp.fc2"].endswith("GELU"), reached


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].function in fused_ops.FORGED])
def test_any_kind_whose_parameters_are_scalars(kind: str) -> None:
    ratio = (0.1, 0.5) if kind == "band" else 0.4
    plain, fused, x = pair(residual_stream, ratio, kind=kind)
    assert ran(fused, x) == {KINDS[kind].function: 1, "elementwise_threshold": 1}
    for change in (None, ratio):
        forged_fx.set_ratio(fused, change), forged_fx.set_ratio(plain, change)
        assert torch.equal(fused(x), plain(x))
    for mode in (torch.enable_grad, forged_fx.straight_through):
        with mode():
            found, expected = (
                torch.autograd.grad(m(leaf := x.clone().requires_grad_()).sum(), leaf) for m in (fused, plain)
            )
        assert torch.equal(found[0], expected[0])


def test_a_kind_with_channels_is_not_fused() -> None:
    torch.manual_seed(0)
    model, x = Net(residual_stream).eval(), torch.randn(4, 3, 8, 8)
    stats = forged_fx.calibrate(model, [x], channels=True)
    fused = forged_fx.transform(model, stats, 0.2, kind="mean", fuse=True)
    assert fused.forging.fused == 0 and ran(fused, x) == {"mean": 2}


@pytest.mark.parametrize(
    ("path", "kernel"),
    [
        ("torchvision.models.convnext.LayerNorm2d", "norm_threshold"),
        ("timm.layers.LayerNorm2d", "norm_threshold"),
        ("timm.layers.BatchNormAct2d", "elementwise_threshold"),
    ],
)
def test_norms_of_other_libraries(path: str, kernel: str) -> None:
    where, _, name = path.rpartition(".")
    torch.manual_seed(0)
    model, x = Net(lambda m, x, last: last(m.same(x))).eval(), torch.randn(4, 3, 8, 8)
    model.same = getattr(pytest.importorskip(where), name)(6).eval()
    stats = forged_fx.calibrate(model, [x])
    plain, fused = (forged_fx.transform(model, stats, RATIO, fuse=fuse) for fuse in (False, True))
    assert ran(fused, x) == {"threshold": 1, kernel: 1} and torch.equal(fused(x), plain(x))


def test_a_forward_of_its_own_within_a_norm_runs() -> None:
    layers = pytest.importorskip("timm.layers")
    model, x = Net(lambda m, x, last: last(m.same(x))).eval(), torch.randn(4, 3, 8, 8)
    model.same = layers.BatchNormAct2d(6).eval()
    stats = forged_fx.calibrate(model, [x])
    plain, fused = (forged_fx.transform(model, stats, RATIO, fuse=fuse) for fuse in (False, True))
    before = fused(x)
    for forged in (plain, fused):
        forged.same.act.forward = torch.tanh
    assert torch.equal(fused(x), plain(x)) and not torch.equal(fused(x), before)


def test_train_mode_is_not_fused(resnet) -> None:
    _, fused, x = resnet
    fused.bn.train()
    assert ran(fused, x) == {"threshold": 2}
    fused.eval()
    assert ran(fused, x) == {"threshold": 1, "elementwise_threshold": 1}


def test_a_hook_runs_and_so_prevents_fusion(resnet) -> None:
    _, fused, x = resnet
    seen = []
    handle = fused.relu.register_forward_hook(lambda module, args, result: seen.append(result))
    assert ran(fused, x) == {"threshold": 2} and len(seen) == 1
    handle.remove()
    assert ran(fused, x) == {"threshold": 1, "elementwise_threshold": 1} and len(seen) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(0))
    try:
        assert ran(fused, x) == {"threshold": 2} and len(seen) > 3
    finally:
        handle.remove()
    model = Net(residual_stream).eval()
    model.bn.register_forward_hook(lambda *_: None)
    hooked = forged_fx.transform(model, forged_fx.calibrate(model, [x]), RATIO, fuse=True)
    assert {row.reached for row in forged_fx.describe(hooked)} == {
        "in the graph",
        "in the graph, in one call with add + ReLU",
    }
    model = Net(lambda m, x, last: last(m.relu(x))).eval()
    model.relu.register_forward_hook(lambda *_: None)
    assert forged_fx.transform(model, forged_fx.calibrate(model, [x]), RATIO, fuse=True).forging.fused == 0


def test_a_module_that_is_replaced_runs(resnet) -> None:
    _, fused, x = resnet
    before = fused(x)
    fused.relu = nn.Tanh()
    assert ran(fused, x) == {"threshold": 2} and not torch.equal(fused(x), before)
    fused.relu = nn.GELU()
    assert ran(fused, x) == {"threshold": 1, "elementwise_threshold": 1}


@pytest.mark.parametrize("between, name", [(added, "bn"), (pre_activation, "bn"), (residual_stream, "relu")])
@pytest.mark.parametrize("other", [nn.Identity, nn.ReLU, lambda: nn.LayerNorm(8), lambda: nn.BatchNorm2d(6).eval()])
def test_a_module_of_another_place_in_the_chain(between: Callable, name: str, other: Callable) -> None:
    plain, fused, x = pair(between)
    for model in (plain, fused):
        setattr(model, name, other())
    assert torch.equal(fused(x), plain(x))


def test_an_operand_of_more_dimensions() -> None:
    plain, fused, x = pair(lambda m, x, last: last(m.relu(x + m.gamma[None])))
    assert fused(x[0]).shape == plain(x[0]).shape == (1, 6, 8, 8)


def test_a_sum_in_place_of_a_buffer_stays_in_it() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
            self.register_buffer("state", torch.zeros(1, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.state.add_(self.first(x)))

    torch.manual_seed(0)
    model, x = Sums().eval(), torch.randn(1, 8)
    stats = forged_fx.calibrate(model, [x])
    plain, fused = (forged_fx.transform(model, stats, RATIO, fuse=fuse) for fuse in (False, True))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(fused(x), plain(x))
    assert fused.state.any() and torch.equal(fused.state, plain.state)


def test_without_values() -> None:
    _, fused, x = pair(residual_stream)
    assert copy.deepcopy(fused).to("meta")(x.to("meta")).shape == fused(x).shape


def test_autocast_is_not_fused(resnet) -> None:
    plain, fused, x = resnet
    with torch.autocast("cpu", torch.bfloat16):
        assert ran(fused, x) == {"threshold": 2}
        assert torch.equal(fused(x), plain(x))


def test_thresholds_stay_in_reach(resnet) -> None:
    plain, fused, x = resnet
    results = [fused(x)]
    for ratio in (0, {"last": 0.5, "*": 0.1}):
        forged_fx.set_ratio(fused, ratio)
        forged_fx.set_ratio(plain, ratio)
        assert torch.equal(fused(x), plain(x)) and not torch.equal(fused(x), results[-1])
        results.append(fused(x))
    assert thresholds_of(fused) == thresholds_of(plain)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_and_their_own(resnet, how: str) -> None:
    plain, fused, x = resnet
    if how == "deepcopy":
        twin = copy.deepcopy(fused)
    else:
        fused.between = plain.between = None
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert ran(twin, x) == {"threshold": 1, "elementwise_threshold": 1}
    assert torch.equal(twin(x), fused(x)) and twin.state_dict().keys() == fused.state_dict().keys()
    forged_fx.set_ratio(twin, 0)
    with torch.no_grad():
        twin.bn.weight.zero_()
    assert not torch.equal(twin(x), fused(x)) and torch.equal(fused(x), plain(x))


def test_a_compiler_gets_the_steps(resnet) -> None:
    plain, fused, x = resnet
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(gm)
        return gm

    assert torch.equal(torch.compile(fused, backend=backend, fullgraph=True)(x), plain(x))
    assert [str(n.target) for n in graphs[0].graph.nodes].count("forged_fx.threshold.default") == 2
    assert not any("elementwise" in str(n.target) for n in graphs[0].graph.nodes)
    exported = torch.export.export(fused, (x,))
    assert torch.equal(exported.module()(x), plain(x))


def test_off_on_a_cpu_unless_asked(resnet) -> None:
    plain, fused, _ = resnet
    stats = plain.forging.stats
    torch.manual_seed(0)
    default = forged_fx.transform(Net(residual_stream).eval(), stats, RATIO)
    assert default.forging.fused is None and default.code == plain.code != fused.code
    assert "fused" not in str(forged_fx.describe(default))
    assert str(forged_fx.describe(fused)).endswith("one graph; 1 thresholds fused with what produces their inputs")


def test_region_by_region_says_that_nothing_was_fused() -> None:
    class Branches(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.relu(self.bn(self.first(x)))) if x.sum() > -1e9 else x

    model, x = Branches(None).eval(), torch.randn(2, 3, 8, 8)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), RATIO, fuse=True)
    assert not isinstance(forged, ForgedModule)
    assert "no thresholds fused with what produces their inputs (only one graph can be)" in str(
        forged_fx.describe(forged)
    )


def test_alike_is_within_rounding_of_the_largest_value() -> None:
    a = torch.tensor([1000.0, 1.0, torch.inf, -torch.inf, torch.nan])
    for at, value, expected in [(1, 1.3, True), (1, 1.5, False), (2, -torch.inf, False), (3, torch.nan, False),
                                (4, torch.inf, False), (2, 1e30, False), (0, 1000.5, False)]:  # fmt: skip
        b = a.clone()
        b[at] = value
        assert alike({"y": a}, {"y": b}) is expected, (at, value)
    assert alike(a[2:], a[2:]) and alike(a[:0], a[:0]) and not alike(a, a.double()) and not alike((a,), (a, a))


def runs_instead(monkeypatch: pytest.MonkeyPatch, name: str, chain: Callable) -> None:
    monkeypatch.setitem(fused_ops.OPERATORS, name, replace(fused_ops.OPERATORS[name], chain=chain))


def test_a_fused_graph_that_differs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = fused_ops.OPERATORS["elementwise_threshold"].chain
    runs_instead(monkeypatch, "elementwise_threshold", lambda **a: chain(**{**a, "eps": 1.0}))
    plain, fused, _ = pair(lambda m, x, last: last(m.bn(x)))
    assert fused.code == plain.code and fused.forging.fused == 0
    assert "with every threshold at 0 the result differs" in str(forged_fx.describe(fused))


def test_a_model_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: every producer that has a kernel runs it, here in the interpreter."""
    for name, file in (("elementwise_threshold", "fused"), ("norm_threshold", "norm")):
        launch = getattr(kernels(file), f"launch_{name}")

        def run(*, launch: Callable = launch, straight_through: bool = False, **arguments):
            return fused_ops._with_kept(*launch(**arguments))

        runs_instead(monkeypatch, name, run)
    monkeypatch.setattr(sys.modules["forged_fx.transform"], "same", alike)  # bit for bit they are not
    for name in ("residual stream", "pre-activation", "layer scale", "residual, rms norm"):
        plain, fused, x = pair(CASES[name][0])
        assert fused.forging.fused == 1
        with torch.no_grad():
            torch.testing.assert_close(fused(x), plain(x), atol=1e-5, rtol=1e-5)


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "ahead": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "ahead of backward": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_every_kind_of_hook_is_one(kind: str) -> None:
    module = nn.Linear(2, 2)
    assert is_as_its_class(module)
    HOOKS[kind](module)
    assert not is_as_its_class(module)


def test_a_norm_is_asked_for_what_it_would_use_itself() -> None:
    """As Python finds it: what stands in the instance's own dict comes first, as in the replicas of DataParallel."""
    x = torch.randn(2, 6, 6, 5)
    for norm, name in ((nn.BatchNorm2d(6), "weight"), (nn.BatchNorm2d(6), "running_mean"), (nn.LayerNorm(5), "bias")):
        model = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
        stats = forged_fx.calibrate(model, [x])
        fused, plain = (forged_fx.transform(model, stats, 2**-3, fuse=fuse) for fuse in (True, False))
        assert fused.forging.fused == 1
        for forged in (fused, plain):
            module = forged.get_submodule("0")
            vars(module)[name] = torch.full_like(getattr(norm, name).detach(), 5.0)
        with torch.no_grad():
            assert torch.equal(fused(x), plain(x)) and not torch.allclose(plain(x), model(x))


def test_an_input_that_the_norm_refuses_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    x = torch.randn(2, 6, 6, 5)
    fused = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3, fuse=True)
    for context in (torch.no_grad, torch.enable_grad):
        with context(), pytest.raises(ValueError, match="expected 4D input"):
            fused(x[0])


def test_a_norm_that_has_no_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    x = 3 * torch.randn(2, 6, 6, 5) + 1
    stats = forged_fx.calibrate(model, [x])
    stats.example = None  # no audit
    fused, plain = (forged_fx.transform(model, stats, 2**-3, fuse=fuse) for fuse in (True, False))
    assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("made", [lambda: nn.BatchNorm2d(6), lambda: nn.LayerNorm(5)], ids=["BatchNorm", "LayerNorm"])
def test_an_eps_that_is_a_tensor(made: Callable) -> None:
    """It may be written to, and a kernel is given a number."""
    model = nn.Sequential(made(), nn.Conv2d(6, 2, 1)).eval()
    x = torch.randn(2, 6, 6, 5)
    fused = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0, fuse=True)
    for network in (model, fused):
        network.get_submodule("0").eps = torch.tensor(0.5)
    assert ran(fused, x) == {"threshold": 1} and torch.equal(fused(x), model(x))


@pytest.mark.parametrize("ahead", [nn.Identity, nn.Dropout])
def test_what_writes_into_the_callers_input_still_does(ahead):
    """A layer that passes its input on makes no tensor of its own for the step behind it to write into."""
    torch.manual_seed(0)
    model, x = nn.Sequential(ahead(), nn.ReLU(inplace=True), nn.Linear(4, 4)).eval(), torch.randn(3, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x.clone()]), 0.1, fuse=True)
    expected, given = x.clone(), x.clone()
    model(expected), forged(given)
    assert torch.equal(given, expected) and not torch.equal(given, x)
