"""torchrun --nproc-per-node 2, with processes that are forks of it, which has imported everything by then.

Usage: python torchrun.py PROGRAM [ITS ARGUMENTS]
"""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def torchrun(program: str, *arguments: Any, forks: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """How it ended, and what it said. forks=False: torchrun itself, where it is to end what others have left."""
    own = [__file__] if forks else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, *own, program, *arguments],
        env={**os.environ, **environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(*argv: str) -> None:
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    program, *_ = argv = sys.argv[1:]
    runpy.run_path(program)
    for name in ("forged_fx.search", "forged_fx.transform", "torch._dynamo", "torch._inductor.compile_fx"):
        importlib.import_module(name)  # as the work would, in each of them
    sizes: dict[str, int] = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "max_restarts": 0}
    where = {"run_id": Path(program).stem, "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    elastic_launch(LaunchConfig(**sizes, **where, start_method="fork"), run)(*argv)
