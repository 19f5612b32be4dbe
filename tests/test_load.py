"""Long work takes no more memory than short work. (Two processes on one folder: test_evaluate_resume, test_faults.)"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loads import growth


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own account of a process")
@pytest.mark.parametrize(("work", "size"), [("calibrate", 150), ("evaluate", 2500)])
def test_memory_does_not_grow_with_the_work(work, size):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("loads.py"), work, str(size)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert growth(json.loads(done.stdout)) < 0.01


def test_growth_is_seen():
    assert growth([100] * 90 + [102] * 10) == pytest.approx(0.02)
    assert growth([500] + [100] * 99) == 0  # what the start takes, and gives back
