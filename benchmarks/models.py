"""The models that benchmarks run on, by name, with the shape of one input.

    torchvision:resnet18, timm:vit_tiny_patch16_224    any model of those libraries, random weights
    preact:28-10                                       a pre-activation WideResNet, random weights, 32x32 input
    zoo:cifar_resnet2b_adv                             a trained model from the folder FORGED_FX_ASSETS
    digits                                             the demo's CNN, random weights

To add a source, add a function and a row to `SOURCES`, and one to `NAMES` if what it has can be listed. What a forward
pass costs does not depend on the weights.
"""

import argparse
import difflib
import importlib.util
import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from forged_fx import digits

Shape = tuple[int, ...]


class PreActBlock(nn.Module):
    """BatchNorm and ReLU ahead of each convolution (He et al. 2016, Identity mappings in deep residual networks)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        same = stride == 1 and channels_in == channels
        self.shortcut = None if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(out)
        return skip + self.conv2(torch.relu(self.bn2(self.conv1(out))))


class WideResNet(nn.Module):
    """Zagoruyko and Komodakis 2016: `depth` = 6n + 4 layers, `width` times the channels; 10 classes."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"a WideResNet has 6n + 4 layers (10, 16, 22, 28, ...), not {depth}")
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        layers, channels = [], 16
        for wide, first_stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for i in range(blocks):
                layers.append(PreActBlock(channels, wide, first_stride if i == 0 else 1))
                channels = wide
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn(self.blocks(self.conv(x))))
        return self.fc(out.mean((2, 3)))


def _torchvision(name: str) -> tuple[nn.Module, Shape]:
    import torchvision

    return torchvision.models.get_model(name, weights=None), (3, 224, 224)


def _timm(name: str) -> tuple[nn.Module, Shape]:
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, tuple(model.pretrained_cfg["input_size"])


def _assets(name: str) -> Path:
    folder = os.environ.get("FORGED_FX_ASSETS")
    if not folder:
        raise ValueError(f"zoo:{name} is read from a folder: name it in the environment variable FORGED_FX_ASSETS")
    return Path(folder)


def _zoo(name: str) -> tuple[nn.Module, Shape]:
    spec = importlib.util.spec_from_file_location("zoo", _assets(name) / "zoo.py")
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    return zoo.load(name), (1, 28, 28) if name.startswith("mnist") else (3, 32, 32)


def _preact(name: str) -> tuple[nn.Module, Shape]:
    depth, _, width = name.partition("-")
    if not (depth.isdecimal() and width.isdecimal()):
        raise ValueError(f"preact:{name}: write preact:DEPTH-WIDTH, such as preact:28-4")
    return WideResNet(int(depth), int(width)), (3, 32, 32)


def _digits(_: str) -> tuple[nn.Module, Shape]:
    return digits.cnn(), digits.SHAPE


SOURCES: dict[str, Callable[[str], tuple[nn.Module, Shape]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "preact": _preact,
    "zoo": _zoo,
    "digits": _digits,
}


def _torchvision_names(_: str) -> Collection[str]:
    import torchvision

    return torchvision.models.list_models()


def _timm_names(name: str) -> Collection[str]:
    """A name may be followed by a dot and a set of weights."""
    import timm

    return [name] if timm.is_model(name) else timm.list_models()


# All that a source has; the rest of the name is given.
NAMES: dict[str, Callable[[str], Collection[str]]] = {
    "torchvision": _torchvision_names,
    "timm": _timm_names,
    "zoo": lambda name: [folder.parent.name for folder in _assets(name).glob("models/*/config.json")],
    "digits": lambda _: [""],
}


def _loader(source: str, name: str) -> Callable[[str], tuple[nn.Module, Shape]]:
    if source not in SOURCES:
        raise ValueError(f"{name!r}: a model's name begins with one of {', '.join(SOURCES)}; see benchmarks/models.py")
    return SOURCES[source]


def model_name(name: str) -> str:
    """The name, for argparse: an error where `load` would find no such model, before anything is measured."""
    source, colon, rest = name.partition(":")
    try:
        make = _loader(source, name)
        if source not in NAMES:
            with torch.device("meta"):
                make(rest)
        elif rest not in (there := NAMES[source](rest)):
            near = "".join(f", but {source}{colon}{other}" for other in difflib.get_close_matches(rest, there, 1))
            raise ValueError(f"{source} has no model {rest!r}{near}")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def load(name: str) -> tuple[nn.Module, Shape]:
    """The model in eval mode, and the shape of one input (channels, height, width). Random weights are seeded.

    Raises ValueError for a name that begins with no row of `SOURCES`.
    """
    source, _, rest = name.partition(":")
    make = _loader(source, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, shape = make(rest)
    return model.eval(), shape
