"""A part of `benchmarks/coverage.py`: a few models of each library, that between them take every way through ours."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODELS = [
    "timm:test_resnet",
    "timm:test_vit",
    "timm:test_convnext",
    "tv:squeezenet1_1",
    "tv:SwinTransformer",
    "tv:VisionTransformer",
    "tv:googlenet",
    "tv:SSD",
    "hf:bert",
    "hf:gpt2",
    "hf:llama",
    "hf:vit",
    "hf:clip",
    "hf:whisper",
    "hf:t5",
    "hf:mixtral",
    "hf:wav2vec2",
    "hf:dinov2",
    "hf:segformer",
]

SIDE = 32


def ssd(tv):
    first, second = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 2, 1, groups=4)
    backbone = nn.Sequential(first, nn.BatchNorm2d(32), nn.ReLU6(), second, nn.Hardswish())
    backbone.out_channels = [32]
    boxes = tv.detection.anchor_utils.DefaultBoxGenerator([[2]])
    return tv.detection.ssd.SSD(backbone, boxes, (2 * SIDE, 2 * SIDE), 3)


# Of the classes that torchvision's names have, smaller ones: none of its own is shallow.
SMALL = {
    "tv:SwinTransformer": lambda tv: tv.SwinTransformer([2, 2], 16, [2, 2], [2, 2], [4, 4]),
    "tv:VisionTransformer": lambda tv: tv.VisionTransformer(SIDE, 4, 2, 2, hidden_dim=32, mlp_dim=64),
    "tv:SSD": ssd,
}


def built(models, build, name):
    if name not in SMALL:
        return build(name)
    torch.manual_seed(0)
    model, x = SMALL[name](pytest.importorskip("torchvision.models")), torch.rand(2, 3, SIDE, SIDE)
    models.open_branches(model)
    return model.eval(), (list(x),) if name == "tv:SSD" else (x,), {}


@pytest.fixture(scope="module")
def coverage():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("coverage_benchmark", BENCHMARKS / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    models = module.coverage_models
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", functools.partial(built, models, models.build))
        patch.setattr(module, "check", functools.cache(module.check))
        yield module
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_forged_and_the_oracle_agrees(coverage, name):
    pytest.importorskip({"timm": "timm", "tv": "torchvision", "hf": "transformers"}[name.partition(":")[0]])
    row = coverage.check(name)
    assert not row.error, row
    assert row.sites == row.oracle_sites == row.rewritten > 0 and row.maxima_agree, row
    assert row.exact_at_0 and row.equals_oracle and row.keys_kept and row.gradient == "equal", row
    # Dynamo makes no graph of Mixtral's loop over its experts: the backend must say so.
    assert row.compiled.startswith(
        "ValueError: sites 'model.layers.0.mlp.experts'" if "mixtral" in name else "equal"
    ), row


def test_the_run_resumes_and_sums_up(coverage, tmp_path, monkeypatch, capsys):
    out = tmp_path / "coverage.csv"
    monkeypatch.setattr(coverage.coverage_models, "names", lambda: ["hf:bert", "hf:vit", "tv:none"])
    for only, lines in (("hf:bert", 1), ("*", 2), ("*", 0)):
        monkeypatch.setattr(sys, "argv", ["coverage.py", "--only", only, "--out", str(out), "--threads", "1"])
        coverage.main()
        assert capsys.readouterr().out.count("'model':") == lines
    assert out.read_text().count("\n") == 4  # the header, and a row per model: the one that fails is kept, with why
    rows = coverage._read(out)
    assert "Unknown model" in rows["tv:none"].error and rows["hf:bert"].whole
    assert coverage.summary(rows.values()).endswith("models 2 of 3, sites 28 of 28")
