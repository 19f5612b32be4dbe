"""Networks that more than one test needs."""

import pytest
import torch
from torch import nn


class PreActBlock(nn.Module):
    """He et al. 2016 (arXiv 1603.05027): bn-relu-conv, twice; the shortcut reads the first bn-relu's result."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(i, o, 1, stride, bias=False) if stride != 1 or i != o else None

    def forward(self, x):
        h = torch.relu(self.bn1(x))
        if self.shortcut is not None:
            x = self.shortcut(h)
        return x + self.conv2(torch.relu(self.bn2(self.conv1(h))))


class PreActResNet(nn.Module):
    """A pre-activation ResNet-18 for 32x32 images."""

    def __init__(self, width=64, blocks=(2, 2, 2, 2), classes=10):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        layers, i = [], width
        for stage, n in enumerate(blocks):
            o = width * 2**stage
            layers += [PreActBlock(i if k == 0 else o, o, 2 if stage and k == 0 else 1) for k in range(n)]
            i = o
        self.blocks = nn.Sequential(*layers)
        self.bn, self.fc = nn.BatchNorm2d(i), nn.Linear(i, classes)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.blocks(self.conv(x)))).mean((2, 3)))


def vit_in_a_folder(folder):
    """A small image classifier of Hugging Face's, with its processor, as from_pretrained reads it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)


class Asserts(nn.Linear):
    """(Here, as pytest writes the assertions of tests anew.)"""

    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        assert x.dim() == 2 or x.dim() == 3, "2 or 3"
        return super().forward(x)
