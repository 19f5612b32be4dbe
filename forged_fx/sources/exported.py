"""Programs that torch.export saved: models without their Python code.

A program is code: what it computes it computes here. But nothing in its file is unpickled beyond tensors.

One that was made of a forged model has its thresholds, and no record of its forging: it is attacked as it is, and
`calibrate` and `transform` know it for forged.
"""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import fx, nn

from forged_fx import fused_ops as fused_ops  # imported, it defines the operators that a forged program calls

# Members of an archive that torch.export.load hands to pickle as they are, or to the loader of shared libraries. (Its
# reader does not tell small letters from capitals.)
EXECUTED = ("custom_obj_", "opaque_obj_", "/aotinductor/")


def load_program(path: str | os.PathLike[str]) -> nn.Module:
    """The program as a module, in eval mode. ValueError if it holds pickled objects or is no program."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no program of torch.export: save one with torch.export.save") from error
    if executed := [name for name in names if any(mark in name.casefold() for mark in EXECUTED)]:
        raise ValueError(
            f"{path} holds pickled objects or compiled code ({executed[0]}), which are not loaded: export without them"
        )
    try:
        with weights_only():
            module = torch.export.load(path).module()
    except Exception as error:
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise ValueError(f"{path} cannot be loaded as a program of torch.export ({reason}); save it anew") from error
    # a program's module refuses .eval(), although that would change nothing in it; the same graph in one that does not
    return fx.GraphModule(module, module.graph, class_name="Exported").eval()


@contextmanager
def weights_only() -> Iterator[None]:
    """torch.load reads tensors only within, whoever calls it with whatever arguments."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
