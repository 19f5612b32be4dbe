"""Verdicts on trained networks, as an independent measurement (hooks, not graphs; other code) found them before.

APGD on the cross-entropy alone, so that it takes seconds: with the true gradient, under BPDA, and transferred. The
complete protocol's figures are in docs/evaluation.md.
"""

from dataclasses import replace

import pytest

import forged_fx
from forged_fx.evaluate import attacks

APGD = ("apgd-ce",)


pytestmark = pytest.mark.usefixtures("single_thread")


@pytest.mark.parametrize(
    ("name", "ratio", "n", "eps", "verdict", "seems", "left"),
    [
        # base, then what the true gradient shows, then the worst case; measured 155, 162, 153 and so on
        ("mnist_cnn_a_adv", 2**-7, 200, 0.3, "masking", (5, 12), (-3, 1)),
        ("cifar_cnn_a_adv4", 2**-7, 150, 8 / 255, "no measurable gain", (0, 6), (-2, 1)),
        ("cifar_resnet2b_adv", 2**-5, 300, 2 / 255, "loss", (-22, -8), (-28, -12)),
    ],
)
def test_the_verdict_is_known(assets, monkeypatch, name, ratio, n, eps, verdict, seems, left):
    monkeypatch.setattr(attacks, "_SMOOTH", ())  # the measurement before had no smooth surrogates
    model = assets.load(name)
    train, test = ("mnist_train", "mnist_test") if "mnist" in name else ("cifar10jpeg_train", "cifar10raw_300")
    stats = forged_fx.calibrate(model, assets.images(train, 2000)[0].split(250))
    x, y = assets.images(test, n)
    forged = forged_fx.transform(model, stats, ratio=ratio)
    result = forged_fx.evaluate(forged, base=model, x=x, y=y, eps=eps, attacks=["apgd-ce"])
    assert result.verdict == verdict

    def ahead(kind):
        return round(n * (result.model.accuracy(kind) - result.base.accuracy(kind)))

    assert seems[0] <= ahead("true gradient") <= seems[1]
    assert left[0] <= ahead("further") <= left[1]
    raised = {finding.name for finding in result.findings if finding.raised}
    assert raised <= {"true gradient above BPDA"} and (verdict != "masking" or raised)


def test_what_a_jump_is_worth_is_found_by_the_smooth_surrogates_alone(assets, monkeypatch):
    """At 1/16 neither the true gradient nor the straight-through one sees most of what the thresholds cost."""
    monkeypatch.setitem(attacks.PRESETS, "quick", replace(attacks.PRESETS["quick"], true=APGD, bpda=APGD))
    model = assets.load("cifar_wide_adv")
    stats = forged_fx.calibrate(model, assets.images("cifar10jpeg_train", 2000)[0].split(250))
    x, y = assets.images("cifar10raw_300", 32)
    forged = forged_fx.transform(model, stats, ratio=2**-4)
    result = forged_fx.evaluate(forged, base=model, x=x, y=y, eps=2 / 255, attacks="quick")
    assert result.verdict == "loss"
    broken = {row.attack: row.broken for row in result.model.rows if row.kind == "BPDA"}
    assert broken["apgd-ce"] <= 1 and sum(broken.values()) >= 5
