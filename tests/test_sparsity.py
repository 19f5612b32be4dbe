"""sparsity: counted against hooks, beside calibration's prediction; by place; saved and drawn."""

import csv
import dataclasses
import json
import warnings

import oracle
import pytest
import torch
from torch import nn

import forged_fx
from forged_fx.lipschitz import SITE_WHOLE
from forged_fx.sparsity import place_of
from forged_fx.stats import SiteStats
from forged_fx.sweep import shares_changed


def shares(row):
    return {key: pytest.approx(getattr(row, key), abs=1e-9) for key in ("before", "after", "net")}


def test_on_a_real_model_it_is_the_hooks_count_and_calibrations_prediction(assets):
    model = assets.load("cifar_resnet2b_adv")
    batches = assets.images("cifar10jpeg_test", 60)[0].split(30)
    stats = forged_fx.calibrate(model, batches)
    forged = forged_fx.transform(model, stats, 2**-5)
    found = forged_fx.sparsity(forged, batches)
    assert [row.site for row in found] == list(stats.sites)
    assert all(abs(row.net - row.predicted) < 0.01 for row in found) and found.overall.net > 0.01
    assert sum(row.elements for row in found) == found.overall.elements == sum(s.elements for s in stats.sites.values())

    thresholds = {site: 2**-5 * stats.sites[site].c_max for site in oracle.layers(model)}
    with oracle.forged(model, thresholds):  # the hooks that count run behind those that cut
        after = oracle.shares_below(model, batches, dict.fromkeys(thresholds, 1e-45))
    assert {row.site: pytest.approx(row.after, abs=1e-9) for row in found if row.site in after} == after


def test_what_each_kind_changes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    x = torch.randn(500, 4)
    with torch.no_grad():
        h = model[1](model[0](x))
    stats = forged_fx.calibrate(model, [x], channels=True)
    c = stats.sites["2"].c_max
    zero = (h == 0).float().mean().item()
    mean, std = (torch.from_numpy(v).float() for v in stats.sites["2"].channel_mean_std())
    small, large = (h.abs() < 0.1 * c).float().mean().item(), (h > 0.6 * c).float().mean().item()
    expected = {  # net, changed, predicted exactly?
        ("hard", 0.1): (small - zero, small - zero, True),
        ("soft", 0.1): (small - zero, 1 - zero, True),
        ("one_sided", 0.1): (small - zero, small - zero, True),
        ("clamp", 0.6): (0.0, large, True),
        ("mean", 0.3): (None, ((h - mean).abs() <= 0.3 * std).float().mean().item(), False),
    }
    for (kind, ratio), (net, changed, predicted) in expected.items():
        forged = forged_fx.transform(model, stats, ratio, kind=kind, include="2")
        (row,) = forged_fx.sparsity(forged, x.split(300))
        assert (row.kind, row.elements, row.before) == (kind, h.numel(), pytest.approx(zero)), kind
        assert row.changed == pytest.approx(changed), kind
        assert (row.predicted is not None) == predicted
        if net is not None:
            assert row.net == pytest.approx(net) and row.predicted == pytest.approx(net, abs=0.01), kind


def test_describe_and_sweep_call_zeroed_what_is_measured_here():
    """Beyond a ReLU's own zeros, so that nothing jumps at ratio 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    x = torch.randn(500, 4)
    stats = forged_fx.calibrate(model, [x])
    assert stats.sites["2"].share_zero > 0.3
    forged = forged_fx.transform(model, stats, 0.2)
    rows = forged_fx.describe(forged)
    for row, measured in zip(rows, forged_fx.sparsity(forged, [x]), strict=True):
        assert row.net_zeroed == measured.predicted == pytest.approx(measured.net, abs=0.01)
        line = next(line for line in str(rows).splitlines() if line.startswith(row.site))
        assert f" {row.net_zeroed:.1%} " in line
    assert rows[1].share_zeroed == pytest.approx(rows[1].net_zeroed + stats.sites["2"].share_zero)
    elements = [stats.sites[row.site].elements for row in rows]
    overall = sum(row.net_zeroed * n for row, n in zip(rows, elements, strict=True)) / sum(elements)
    assert shares_changed(forged, stats)[0] == pytest.approx(overall)
    assert "zeroed: of the inputs seen in calibration, beyond those that were 0 already" in str(rows)
    for ratio in (0, 2**-20):
        forged_fx.set_ratio(forged, ratio)
        assert all(row.net_zeroed < 1e-3 for row in forged_fx.describe(forged))


@pytest.mark.parametrize(
    ("kind", "ratio", "text"),
    [
        ("hard", 2**-6, "at ratio 1/64: 2 of 2 sites"),
        ("hard", 0.1, "at ratio 0.1: 2 of 2 sites"),
        ("hard", 0, "\n0 of 2 sites forged, 2 left at ratio 0, as"),
        ("clamp", 0.7, "at ratio 0.7: 2 of 2 sites"),
        ("hard", {"0": 0.1, "2": 0.2}, "\nat ratios of their own: 2 of 2 sites"),
        ("hard", {"0": 0.1, "2": 0}, "\nat ratio 0.1: 1 of 2 sites forged, 1 left at ratio 0, as"),
        ("band", (0.1, 0.7), "\n2 of 2 sites"),
        ("clamp", None, "\n0 of 2 sites forged, 2 switched off, as"),
    ],
)
def test_describe_says_the_ratio_where_there_is_one(kind, ratio, text):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)).eval(), torch.randn(50, 4)
    stats = forged_fx.calibrate(model, [x])
    for statistic in ("max", "quantile(0.9)"):
        forged = forged_fx.transform(model, stats, ratio, kind=kind, statistic=statistic)
        assert text in str(forged_fx.describe(forged))
    if not isinstance(ratio, float):
        return
    assert {row.ratio for row in forged_fx.describe(forged)} == {ratio}


class Mean(nn.Module):
    def __init__(self, *members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x):
        return sum(member(x) for member in self.members) / len(self.members)


def test_each_of_several_forged_models_within_one_is_counted():
    """Their sites have the same names."""
    torch.manual_seed(0)
    x, members = torch.rand(20, 6), [nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    pair = [
        forged_fx.transform(model, forged_fx.calibrate(model, [x]), ratio)
        for model, ratio in zip(members, (2**-7, 0.5), strict=True)
    ]
    alone = [forged_fx.sparsity(one, [x]) for one in pair]
    found = forged_fx.sparsity(Mean(*pair), [x])
    assert [row.site for row in found] == ["members.0.0", "members.0.2", "members.1.0", "members.1.2"]
    for row, each in zip(found, [*alone[0], *alone[1]], strict=True):
        assert row == dataclasses.replace(each, site=row.site)
    described = forged_fx.describe(Mean(*pair))
    assert [row.site for row in described] == [row.site for row in found]
    assert described[2].threshold == forged_fx.describe(pair[1])[0].threshold != described[0].threshold
    assert alone[0][0].net < alone[1][0].net and [row.site for row in forged_fx.sparsity(Mean(pair[0]), [x])] == [
        "0",
        "2",
    ]
    rows = forged_fx.lipschitz(Mean(*members), Mean(*pair), x[:4], eps=0.1, steps=1)
    kept = {row.where: row.forged for row in rows if row.what == SITE_WHOLE}
    assert (
        kept.keys() == {row.site for row in found} and kept["members.0.2"] != kept["members.1.2"] and not rows.not_seen
    )


def test_inputs_that_mean_nothing_and_inputs_of_another_scale():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6)).eval(), torch.rand(50, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"the input of site '0' holds NaN or infinity in batch 1 \("):
            forged_fx.sparsity(forged, [x, torch.full_like(x, wrong)])
    measures = {
        "sparsity": lambda x: forged_fx.sparsity(forged, [x]),
        "lipschitz": lambda x: forged_fx.lipschitz(model, forged, x[:4], steps=1),
    }
    for name, measure in measures.items():
        for scale in (255, 1 / 255):
            with pytest.warns(
                UserWarning, match=rf"{name}: the first forged site is given values of up to .* saw 0\.9"
            ) as warned:
                measure(scale * x)
            assert {warning.filename for warning in warned} == {__file__}  # the caller's
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            measure(2 * x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.downsample = nn.Sequential(nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.layer(self.embed(x))
        return self.head((x + self.downsample(x)).mean(1))


def test_places_sums_and_files(tmp_path):
    torch.manual_seed(0)
    model, x = Encoder().eval(), torch.randn(6, 7, 5)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-4)
    found = forged_fx.sparsity(forged, [x])
    assert [row.place for row in found] == [
        "stem", "attention: q, k, v", "attention: projection", "MLP, first layer", "MLP, second layer", "shortcut",
        "head",
    ]  # fmt: skip
    mlp = next(row for row in found.by_place if row.site == "MLP, second layer")
    assert shares(mlp) == shares(found[4])
    found.save(tmp_path / "s.json")
    found.save(tmp_path / "s.csv")
    saved = json.loads((tmp_path / "s.json").read_text())
    assert saved["rows"][3]["net"] == found[3].net and saved["overall"]["elements"] == found.overall.elements
    with open(tmp_path / "s.csv", newline="") as file:
        assert [float(row["after"]) for row in csv.DictReader(file)] == [row.after for row in found]
    found.plot(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "MLP, second layer" in str(found) and "overall" in str(found)
    with pytest.raises(ValueError, match=r"\.json or \.csv"):
        found.save(tmp_path / "s.txt")
    with pytest.raises(ValueError, match="not forged"):
        forged_fx.sparsity(model, [x])
    with pytest.raises(ValueError, match="no batch"):
        forged_fx.sparsity(forged, [])


@pytest.mark.parametrize(
    ("site", "place"),
    [
        ("blocks.3.attn.qkv", "attention: q, k, v"),
        ("encoder.layer.0.attention.self.query", "attention: q, k, v"),
        ("blocks.3.attn.proj", "attention: projection"),
        ("encoder.layer.0.attention.output.dense", "attention: projection"),
        ("encoder.layer.0.output.dense", "MLP, second layer"),
        ("encoder.layer.0.intermediate.dense", "MLP, first layer"),
        ("blocks.3.mlp.fc1", "MLP, first layer"),
        ("encoder.layers.2.mlp.3", "MLP, second layer"),
        ("model.layers.1.mlp.down_proj", "MLP, second layer"),
        ("layer2.0.downsample.0", "shortcut"),
        ("layer2.0.conv2", "other conv2d"),
        ("fc", "head"),
        ("layer2.0.relu@1", "activation: conv2d"),
    ],
)
def test_places_by_name(site, place):
    assert place_of(site, SiteStats("conv2d", None, (), None, (), layer=True)) == place


def test_inputs_of_another_scale_are_noticed_below_0_too():
    model, x = nn.Sequential(nn.Linear(4, 6)).eval(), torch.rand(50, 4)
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]))
    with pytest.warns(UserWarning, match="the first forged site is given values of up to 2"):
        forged_fx.sparsity(forged, [-255 * x])
