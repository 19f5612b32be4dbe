"""Rows of a benchmark's CSV file, and what their figures were taken on."""

import argparse
import csv
import datetime
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def csv_file(text: str) -> Path:
    """What `--csv` names, for argparse: a folder is refused now, and not when the first row has been measured."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name the file that the rows are added to")
    return Path(text)


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row; to a new file, the keys as its first line. Floats are written with five digits."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(written(row))


def written(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}


def taken_on(device: str) -> dict[str, str]:
    """The columns that say on what, by which versions and when."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def device_name(device: str) -> str:
    """In words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__
