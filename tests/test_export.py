"""Forged models leave PyTorch's eager mode: torch.export, an AOTInductor package in a fresh process, ONNX."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import forged_fx


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.weight = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return self.bn(self.conv(x)).relu().mean((2, 3)) @ self.weight


def whole(model, x):
    return forged_fx.transform(model, forged_fx.calibrate(model, [x]), 2**-3)


def by_module(model, x):
    model.bn.register_forward_hook(lambda *_: None)
    model.register_forward_hook(lambda *_: None)  # a graph would not run it
    return whole(model, x)


def made(how):
    torch.manual_seed(0)
    return how(Net().eval(), torch.randn(4, 3, 8, 8))


@pytest.fixture(params=[whole, by_module])
def forged(request):
    return made(request.param)


@pytest.fixture
def x():
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def export(forged, x):
    return torch.export.export(forged, (x,), dynamic_shapes=({0: Dim("batch")},))


def test_torch_export(forged, x):
    program = export(forged, x)
    assert sum(n.target is torch.ops.forged_fx.threshold.default for n in program.graph.nodes) == 2
    assert {name for name in program.state_dict if "forged" in name} == {"conv.forged_threshold", "forged_threshold"}
    for batch in (x, x[:3]):
        assert torch.equal(program.module()(batch), forged(batch))


def test_an_exported_program_is_saved_and_loaded(forged, x, tmp_path):
    torch.export.save(export(forged, x), tmp_path / "m.pt2")
    assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(x), forged(x))


RUN = """
import sys, torch
x, expected = torch.load(sys.argv[2], weights_only=True)
model = torch._inductor.aoti_load_package(sys.argv[1])
assert "forged_fx" not in sys.modules
print((model(x) - expected).abs().max().item())
"""


def test_module_by_module_the_program_is_the_same(x):
    programs = [export(made(how), x) for how in (whole, by_module)]
    code, other = ((p.graph_module.code, str(p.graph_signature)) for p in programs)
    assert code == other


def test_an_aotinductor_package_runs_where_the_library_is_not_imported(x, tmp_path):
    forged = made(whole)
    own = torch._inductor.config.patch("aot_inductor.metadata", {})  # it writes there, and caches are by it
    with torch.no_grad(), own:
        package = torch._inductor.aoti_compile_and_package(export(forged, x), package_path=str(tmp_path / "m.pt2"))
        torch.save((x[:3], forged(x[:3])), tmp_path / "data")
    command = [sys.executable, "-c", RUN, package, str(tmp_path / "data")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1e-6


def test_onnx(forged, x, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = export(forged, x).run_decompositions(forged_fx.decompositions())
    assert not any("forged_fx" in str(node.target) for node in program.graph.nodes)
    torch.onnx.export(program, verbose=False).save(tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for batch in (x, x[:3]):
        (found,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        assert torch.allclose(torch.from_numpy(found), forged(batch), atol=1e-6)


def test_what_onnx_says_of_the_operator_is_found_in_the_recipe(x):
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match="No ONNX function found") as raised:
        torch.onnx.export(whole(Net().eval(), x), (x,), verbose=False)
    (said,) = re.findall("No ONNX function found for <.*?>", str(raised.value))
    recipes = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert said in " ".join(recipes.split())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_decompositions_equal_the_ops(dtype):
    x, t = torch.randn(1000, dtype=dtype), torch.tensor(0.3)
    x[:3] = torch.tensor([float("nan"), 0.3, -0.0])
    grad = torch.randn_like(x)
    table = forged_fx.decompositions()
    for op, arguments in (
        (torch.ops.forged_fx.threshold.default, (x, t)),
        (torch.ops.forged_fx.threshold_backward.default, (grad, x, t)),
    ):
        assert torch.equal(table[op](*arguments).nan_to_num(9), op(*arguments).nan_to_num(9))
