"""lipschitz against closed forms: linear networks, orthogonal convolutions, and a jump that no derivative sees."""

import contextlib
import csv
import json
import math

import pytest
import torch
from torch import nn

import forged_fx
from forged_fx import gains as gains_of
from forged_fx.lipschitz import (
    FROBENIUS,
    LARGEST,
    SITE_NONZERO,
    SITE_WHOLE,
    SPECTRAL,
    STEP,
    Lipschitz,
    _climb,
    interval,
    jacobian_norms,
)  # fmt: skip
from forged_fx.report import run


def norm(matrix):
    return torch.linalg.matrix_norm(matrix.double(), 2).item()


def rows(found, what):
    return {row.where: row for row in found if row.what == what}


@pytest.fixture
def x():
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    return x * (x.abs() > 0.3)  # some are 0 already


def linear(seed=0, bias=100.0):
    torch.manual_seed(seed)
    layer = nn.Linear(12, 5)
    nn.init.constant_(layer.bias, bias)
    return nn.Sequential(layer).eval()


def test_an_interval_takes_ten_inputs(x):
    model, x = linear(), torch.cat([x, 0.5 * x, 0.9 * x])[:10]
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.4)
    row = rows(forged_fx.lipschitz(model, forged, x, steps=1), SITE_WHOLE)["0"]
    assert row.n == 10 and row.low < row.ratio < row.high
    assert rows(forged_fx.lipschitz(model, forged, x[:9], steps=1), SITE_WHOLE)["0"].low is None


def test_neither_a_forged_model_nor_other_statistics_are_the_plain_one(x):
    model = nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    stats = forged_fx.calibrate(model, [x])
    forged = forged_fx.transform(model, stats, 0.4)
    with pytest.raises(ValueError, match="the first ForgedSequential is forged, too: pass the plain model first"):
        forged_fx.lipschitz(forged_fx.transform(model, stats, 0.1), forged, x)
    model[1].running_var /= 2
    with pytest.raises(ValueError, match=r"the buffer '1.running_var' is not the same"):
        forged_fx.lipschitz(model, forged, x)


@pytest.mark.parametrize("kind, ratio", [("hard", 0.4), ("soft", 0.4), ("clamp", 0.4), ("band", (0.2, 0.5))])
def test_a_linear_network(x, kind, ratio):
    model = linear()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), ratio, kind=kind)
    found = forged_fx.lipschitz(model, forged, x, steps=5)
    w, c = model[0].weight, x.abs().max()
    low, high = {"clamp": (0, 0.4), "band": (0.2, 0.5)}.get(kind, (0.4, 9))
    kept = (x.abs() >= low * c) & (x.abs() <= high * c)
    whole, nonzero, rest = norm(w), *([norm(w * m) for m in mask] for mask in (x != 0, kept & (x != 0)))
    first, second = rows(found, SITE_WHOLE)["0"], rows(found, SITE_NONZERO)["0"]
    assert first.base == pytest.approx(whole, rel=1e-3) and first.forged == pytest.approx(sum(rest) / 6, rel=1e-3)
    assert first.ratio == pytest.approx(sum(r / whole for r in rest) / 6, rel=1e-3)
    assert first.low is first.high is None  # of six inputs
    assert second.ratio == pytest.approx(sum(r / o for r, o in zip(rest, nonzero, strict=True)) / 6, rel=1e-3)
    true, through = (rows(found, SPECTRAL)[k] for k in ("true gradient", "straight-through"))
    assert true.base == through.base == through.forged == pytest.approx(whole, rel=1e-5) and through.ratio == 1
    assert true.forged == pytest.approx(sum(norm(w * m) for m in kept) / 6, rel=1e-5)  # a clamp's 0 has a gradient
    frobenius = rows(found, FROBENIUS)["true gradient"]
    assert frobenius.base == pytest.approx(w.norm().item(), rel=1e-5)
    assert frobenius.forged == pytest.approx(sum((w * m).norm().item() for m in kept) / 6, rel=1e-5)
    for row in rows(found, STEP).values():
        assert row.base <= whole * 1.001 and row.base > 0.3 * whole


def test_many_outputs_are_estimated(x):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 100)).eval()
    spectral, frobenius = jacobian_norms(model, x, 0)
    assert torch.allclose(spectral, torch.full((6,), norm(model[0].weight), dtype=torch.float64), rtol=1e-3)
    assert torch.allclose(frobenius, model[0].weight.norm().double().expand(6), rtol=0.1)


def test_many_outputs_behind_attention_are_estimated():
    """Its fused kernels have no second derivative."""

    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 100)

        def forward(self, x):
            return self.fc(nn.functional.scaled_dot_product_attention(x, x, x).mean((1, 2)))

    torch.manual_seed(0)
    model, x = Attends().eval(), torch.randn(3, 2, 5, 4)
    spectral, _ = jacobian_norms(model, x, 0)
    exact = torch.autograd.functional.jacobian(lambda v: model(v).sum(0), x).movedim(1, 0).flatten(2)
    assert torch.allclose(spectral, torch.linalg.matrix_norm(exact.double(), 2), rtol=1e-3)


class Product(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.weight, self.call = nn.Parameter(torch.randn(4, 4)), call

    def forward(self, x):
        return self.call(x, self.weight).flatten(1)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: torch.addmm(x, x, w),
        lambda x, w: torch.bmm(x[:, None], w.expand(len(x), -1, -1)),
        lambda x, w: torch.baddbmm(x[:, None], x[:, None], w.expand(len(x), -1, -1)),
        lambda x, w: w @ x[:, :, None],
    ],
)
def test_a_product_whose_other_operand_has_a_matrix_for_each_input(call):
    torch.manual_seed(0)
    model, x = Product(call).eval(), torch.randn(5, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.3)
    kept = x.abs() >= forged.get_buffer("forged_threshold")
    found = gains_of.gains(forged, x)["#0"]
    matrix = model.weight if call(x, model.weight).shape == (5, 4, 1) else model.weight.T
    assert found.kept.tolist() == pytest.approx([norm(matrix * m) for m in kept], rel=1e-3)
    assert found.whole.tolist() == pytest.approx([norm(matrix)] * 5, rel=1e-3)


def test_a_product_that_sums_over_the_inputs_is_said_not_to_be_measured():
    model, x = Product(lambda x, w: (w @ x.T).T).eval(), torch.randn(4, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.3)
    found = forged_fx.lipschitz(model, forged, x, steps=1)
    assert found.not_seen == ["#0"] and not rows(found, SITE_WHOLE)


def test_orthogonal_convolutions():
    """A shift by one pixel, and a rotation of the channels: every gain is 1, or that of a part of a rotation."""
    torch.manual_seed(0)
    shift, turn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1, bias=True)
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    with torch.no_grad():
        shift.weight.zero_()
        shift.weight[range(4), range(4), 1, 2] = 1
        turn.weight.copy_(rotation.view(4, 4, 1, 1))
    model = nn.Sequential(shift, turn).eval()
    x = torch.randn(3, 4, 5, 5)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.35)
    found = gains_of.gains(forged, x)
    assert torch.allclose(torch.stack([found["0"].whole, found["0"].kept]), torch.ones(2, 3).double(), atol=1e-4)
    assert torch.allclose(found["1"].whole, torch.ones(3).double(), atol=1e-4)
    with torch.no_grad():
        h = shift(torch.where(x.abs() < forged.get_buffer("0.forged_threshold"), 0, x))
        kept = h.abs() >= forged.get_buffer("1.forged_threshold")
    expected = [max(norm(rotation * m) for m in image.flatten(1).T) for image in kept]
    assert found["1"].kept.tolist() == pytest.approx(expected, abs=1e-3)


def test_tokens_and_windows_belong_to_their_input():
    """A row of the operand is not an input: the largest over an input's rows counts."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x.reshape(-1, 2, 4)).reshape(len(x), -1)

    torch.manual_seed(0)
    model, x = Windows().eval(), torch.randn(3, 6, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.3)
    kept = x.abs() >= forged.get_buffer("fc.forged_threshold")
    expected = [max(norm(model.fc.weight * m) for m in tokens) for tokens in kept]
    assert gains_of.gains(forged, x)["fc"].kept.tolist() == pytest.approx(expected, rel=1e-3)


def test_where_the_rows_do_not_say_whose_they_are_each_input_is_run_by_itself():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x.reshape(-1, 4)[1:])

    torch.manual_seed(0)
    model, x = Loose().eval(), torch.randn(3, 6, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.3)
    kept = x[:, 1:].abs() >= forged.get_buffer("fc.forged_threshold")
    found = gains_of.gains(forged, x)["fc"]
    assert found.kept.tolist() == pytest.approx([max(norm(model.fc.weight * m) for m in t) for t in kept], rel=1e-3)
    assert found.whole.tolist() == pytest.approx([norm(model.fc.weight)] * 3, rel=1e-3)


class Attention(nn.Module):
    """PyTorch's: the tokens first ahead of the first product, and flattened with the inputs ahead of the last one."""

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x)[0].sum(1)


@pytest.mark.parametrize("tokens", [3, 4, 6])
def test_no_input_is_lent_another_ones_rows(tokens):
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(3, tokens, 6)
    x[1] *= 0.05
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.2)
    together, alone = gains_of.gains(forged, x), [gains_of.gains(forged, one[None]) for one in x]
    assert len(together) == len(forged.state_dict().keys() - model.state_dict().keys())
    for site, found in together.items():
        assert found.kept.tolist() == pytest.approx([one[site].kept.item() for one in alone], rel=2e-3)
    first = next(iter(together.values()))
    assert first.kept[1] == 0 < first.kept[0]  # nothing is kept of it


def test_a_site_that_some_inputs_run_and_a_model_of_one_batch_size():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.h = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            x, first = x.view(4, -1), x[:, 0] > 0
            y = x.new_zeros(4, 6)
            y[first] = self.a(x[first])
            y[~first] = self.b(x[~first])
            return self.h(y)

    torch.manual_seed(0)
    model, x = Branch().eval(), torch.randn(4, 6)
    x[:, 0] = torch.tensor([1.0, -1, -1, -1])
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.1)
    found = gains_of.gains(forged, x)
    assert {site: len(values.kept) for site, values in found.items()} == {"a": 1, "b": 1, "h": 4}


def test_rows_that_weigh_the_same_are_told_apart():
    """Letters, one-hot, with the tokens first: seven of eight inputs' worth of them."""

    class Letters(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 4)

        def forward(self, x):
            return self.fc(x.transpose(0, 1)).sum(0)

    torch.manual_seed(0)
    x = nn.functional.one_hot(torch.randint(0, 5, (4, 8)), 5).float()
    x[0] = x[0, 0]
    model = Letters().eval()
    with torch.no_grad():
        model.fc.weight.mul_(torch.tensor([1.0, 5, 20, 80, 300]))
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.5)
    together, alone = gains_of.gains(forged, x)["fc"], [gains_of.gains(forged, one[None])["fc"] for one in x]
    assert together.kept.tolist() == pytest.approx([one.kept.item() for one in alone], rel=1e-3)
    assert len(set(together.kept.tolist())) > 1


def test_what_a_random_model_gives_is_of_each_input_whatever_the_batch_size():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x + 0.1 * torch.randn_like(x))

    torch.manual_seed(0)
    model, x = Noisy(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), torch.rand(12, 6)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.3)
    for size in (1, 5, 12):
        found = forged_fx.lipschitz(model, forged, x, steps=1, batch_size=size)
        assert {row.n for row in found if row.what == SITE_WHOLE} == {12}


def test_a_site_that_runs_twice_counts_by_the_larger(x):
    model = linear()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.4)

    class Twice(nn.Module):
        def __init__(self, *shifts):
            super().__init__()
            self.forged, self.shifts = forged, shifts

        def forward(self, x):
            return sum(self.forged(x.roll(shift, 1)) for shift in self.shifts)

    once, other = (gains_of.gains(Twice(shift), x)["0"].kept for shift in (0, 1))
    both = gains_of.gains(Twice(0, 1), x)["0"]
    assert both.kept.tolist() == pytest.approx(torch.maximum(once, other).tolist(), rel=1e-3)
    assert not torch.allclose(once, other) and not torch.allclose(both.kept, other, rtol=1e-2)


def test_what_a_part_amplifies_the_whole_does_however_early_the_iteration_ends(x, monkeypatch):
    monkeypatch.setattr(gains_of, "ITERATIONS", 1)
    model = linear()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.1)
    for seed in range(5):
        found = gains_of.gains(forged, x, seed)["0"]
        assert (found.whole >= found.nonzero).all() and (found.nonzero >= found.kept).all()


def test_fused_sites_have_the_gains_of_their_chain():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).eval(), torch.randn(5, 6)
    stats = forged_fx.calibrate(model, [x])
    plain, fused = (forged_fx.transform(model, stats, 0.2, fuse=fuse) for fuse in (False, True))
    assert fused.forging.fused
    one, other = (gains_of.gains(forged, x) for forged in (plain, fused))
    assert one.keys() == other.keys() == {"0", "2"}
    for site in one:
        for name in ("whole", "nonzero", "kept"):
            torch.testing.assert_close(getattr(one[site], name), getattr(other[site], name), rtol=1e-3, atol=0)


def test_steps_see_the_jump():
    """x lies just above the threshold: the derivative is 1 there, and the step down is as high as the threshold."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).eval()
    nn.init.ones_(model[0].weight)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [torch.ones(1, 1)]), 0.5)
    x = torch.full((4, 1), 0.501)
    found = forged_fx.lipschitz(model, forged, x, eps=0.1, steps=10)
    assert rows(found, SPECTRAL)["true gradient"].forged == 1
    sizes = [rows(found, LARGEST)[f"within {eps}"].forged for eps in (0.001, 0.01, 0.1)]
    assert sizes == sorted(sizes)  # a smaller ball is a part of a larger one
    jump = rows(found, LARGEST)["within 0.1"]
    assert jump.base == pytest.approx(1, rel=1e-4) and jump.forged > 0.5 / 0.1
    assert rows(found, LARGEST)["within 0.01"].forged > 0.5 / 0.01
    soft = forged_fx.transform(model, forged_fx.calibrate(model, [torch.ones(1, 1)]), 0.5, kind="soft")
    assert rows(forged_fx.lipschitz(model, soft, x, eps=0.1), LARGEST)["within 0.1"].forged < 1.001


class Jumps(nn.Module):
    """0 around x = 0.016; forged, with x cut there, it jumps to 1."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
        with torch.no_grad():
            for layer, (weight, bias) in zip(self.layers[::2], ((1, 0), (-200, 1), (1, 0)), strict=True):
                layer.weight.fill_(weight)
                layer.bias.fill_(bias)

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("boxed", [False, True])
def test_steps_climb_on_their_own_side_of_a_kink(boxed):
    """The function rises with the sum of all pixels from where it begins, and is flat below."""

    class Kink(nn.Module):
        def forward(self, x):
            return (x - 0.875).flatten(1).sum(1, keepdim=True).relu()

    x, radius = torch.full((32, 4), 0.875), 0.25
    start, best = _climb(Kink(), x, radius, 20, 0, boxed, contextlib.nullcontext)
    rises = start.sum(1) > 0
    assert rises.any() and not rises.all()
    assert (best[rises] == (0.125 if boxed else 0.25)).all()  # as much for each as there is room for
    assert torch.equal(best[~rises], start[~rises])


def test_where_the_plain_model_is_flat_a_jump_is_infinitely_larger(tmp_path):
    model = Jumps().eval()
    stats = forged_fx.calibrate(model, [torch.linspace(0, 1, 100)[:, None]])
    forged = forged_fx.transform(model, stats, {"layers.2": 2**-6, "*": 0})
    x = torch.linspace(0.014, 0.018, 12)[:, None]
    found = forged_fx.lipschitz(model, forged, x, eps=0.004, steps=5)
    flat, steps = rows(found, SPECTRAL)["true gradient"], rows(found, STEP)
    assert (flat.base, flat.forged, flat.ratio, flat.n, flat.shown) == (0, 0, None, 0, "none")
    jump, none = steps["within 0.004"], steps["within 4e-05"]
    assert jump.ratio == math.inf and jump.forged > 100 and 0 < jump.n < 12 and (jump.low, jump.high) == (None, None)
    assert rows(found, LARGEST)["within 0.004"].ratio == math.inf and none.ratio is None and none.n == 0
    mixed = rows(forged_fx.lipschitz(model, forged, torch.cat([x, x[:1] / 9]), eps=0.004, steps=5), STEP)
    assert mixed["within 0.004"].ratio == math.inf and mixed["within 0.004"].base > 0  # one input more, with a ratio
    # in files, on a page and in a picture
    found.save(tmp_path / "lipschitz.json")
    found.save(tmp_path / "l.csv")
    found.plot(tmp_path / "l.svg")
    assert list(run._measured(tmp_path / "lipschitz.json", Lipschitz())) == found
    with open(tmp_path / "l.csv", newline="") as file:
        assert {row["ratio"] for row in csv.DictReader(file)} > {"inf", ""}
    assert "inf" in str(found)


def test_inputs_and_outputs_that_cannot_be_measured(x):
    model = linear()
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.1)
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match="x has 1 elements that are NaN or infinite"):
        forged_fx.lipschitz(model, forged, x)
    model[0].bias.data[0] = math.inf
    with pytest.raises(ValueError, match="the plain model gives NaN or infinite logits"):
        forged_fx.lipschitz(model, forged, x[1:])
    model[0].register_forward_hook(lambda module, args, out: (out,))
    with pytest.raises(TypeError, match="the plain model returns tuple; wrap it so that it returns its logits"):
        forged_fx.lipschitz(model, forged, x[1:])


def test_the_plain_model_is_the_one_that_was_forged(x):
    model, other = linear(0, 1.0), linear(1, 1.0)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0)
    with pytest.raises(ValueError, match=r"not made from this plain one \('0.weight' is not the same\): pass"):
        forged_fx.lipschitz(other, forged, x, steps=1)
    with pytest.raises(ValueError, match=r"not made from this plain one \(4 parameters, and the forged one 2"):
        forged_fx.lipschitz(nn.Sequential(model, nn.Linear(5, 5)), forged, x, steps=1)
    found = forged_fx.lipschitz(nn.Sequential(model), forged, x, steps=1)  # in a wrapper
    assert rows(found, SPECTRAL)["true gradient"].ratio == 1


def test_module_by_module_and_left_as_found(x, tmp_path, monkeypatch):
    """The same figures where the model is no graph; files and a picture; nothing of the models is moved."""
    monkeypatch.setattr(gains_of, "TOLERANCE", 0.05)  # not the point here
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(inplace=True), nn.Linear(12, 3))
    stats = forged_fx.calibrate(model, [x])
    whole = forged_fx.transform(model, stats, 0.2)
    model.register_forward_hook(lambda *_: None)
    hooked = forged_fx.transform(model, stats, 0.2)
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = forged_fx.lipschitz(model, whole, x, steps=1, batch_size=4)
    again = forged_fx.lipschitz(model, hooked, x, steps=1, batch_size=4)
    assert [row.where for row in found] == [row.where for row in again]
    for a, b in zip(found, again, strict=True):
        assert (a.base, a.forged, a.ratio) == pytest.approx((b.base, b.forged, b.ratio), rel=1e-4)
    assert model.training and whole.training and not model[0].weight.grad
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and not found.not_seen
    assert "none of it bounds" in str(found)
    found.save(tmp_path / "l.json")
    found.save(tmp_path / "l.csv")
    found.plot(tmp_path / "l.png")
    assert json.loads((tmp_path / "l.json").read_text())["rows"][0]["ratio"] == found[0].ratio
    with open(tmp_path / "l.csv", newline="") as file:
        assert float(next(csv.DictReader(file))["ratio"]) == found[0].ratio
    assert (tmp_path / "l.png").stat().st_size > 1000


def test_errors_and_intervals(x):
    model = linear()
    with pytest.raises(ValueError, match="not forged: pass the plain model first"):
        forged_fx.lipschitz(model, model, x)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.1)
    with pytest.raises(ValueError, match="at least one input"):
        forged_fx.lipschitz(model, forged, x[:0])
    low, high = interval(torch.randn(400, generator=torch.Generator().manual_seed(0)).numpy())
    assert low < 0 < high and high - low == pytest.approx(2 * 1.96 / math.sqrt(400), rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_sites_of_models_in_another_dtype_are_measured(x, dtype):
    model = linear(bias=1.0)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 0.1).to(dtype)
    assert forged_fx.lipschitz(model.to(dtype), forged, x.to(dtype), steps=1).not_seen == []
