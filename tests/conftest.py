"""What the tests share: the real models and images that FORGED_FX_ASSETS points to."""

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

# Before PyTorch is imported: else each process that compiles starts others, which import PyTorch to compile for it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import pytest
import torch
import torch.compiler.config
from hypothesis import HealthCheck, settings

from forged_fx import backend

# test_properties.py: the same cases each time, or (pytest --hypothesis-profile=full) ten times as many others
COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
settings.register_profile("normal", **COMMON, derandomize=True, database=None)
settings.register_profile("full", **COMMON)
settings.load_profile("normal")

# Plain `torch.compile` would take from its cache on disk what another version of the library has made: docs/cost.md.
torch.compiler.config.cache_key_tag = backend._version().hex()

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class NamedAtOnce:
    """A test that fails is named when it does, not only in the summary: a run that is cut off has none."""

    def __init__(self, terminal):
        self.terminal = terminal

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason, *_ = (crash.message if crash else report.longreprtext).strip().splitlines() or [""]
            self.terminal.write_line(f"\nFAILED {report.nodeid} ({report.when}): {reason}")


@pytest.hookimpl(trylast=True)  # when pytest has made it
def pytest_configure(config):
    if terminal := config.pluginmanager.get_plugin("terminalreporter"):  # (xdist's workers have none)
        config.pluginmanager.register(NamedAtOnce(terminal))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Compiled code of one test must not count against the recompilation limit of the next."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def single_thread():
    """Networks as small as some tests' only lose by more threads."""
    from forged_fx.digits import one_thread

    with one_thread():
        yield


@pytest.fixture(scope="session")
def assets():
    """load(name) -> a real model in eval mode; images(name, n) -> float NCHW in [0, 1] and int64 labels."""
    folder = os.environ.get("FORGED_FX_ASSETS")
    if not folder:
        pytest.skip("FORGED_FX_ASSETS is not set: the tests on real models need the models")
    spec = importlib.util.spec_from_file_location("zoo", Path(folder) / "zoo.py")
    zoo = sys.modules["zoo"] = importlib.util.module_from_spec(spec)  # (Dynamo of torch 2.11 and 2.12 imports it)
    spec.loader.exec_module(zoo)

    def images(name, n):
        with np.load(Path(folder) / "data" / f"{name}.npz") as data:
            x, y = data["x"][:n], data["y"][:n]
        x = torch.from_numpy(x).float().div(255)
        return (x.permute(0, 3, 1, 2) if x.ndim == 4 else x.unsqueeze(1)).contiguous(), torch.from_numpy(y).long()

    return SimpleNamespace(load=zoo.load, images=images)
