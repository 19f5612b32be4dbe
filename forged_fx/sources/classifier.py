"""What stands between an image in [0, 1] and a model: normalisation, and the name of the model's input.

Statistics and thresholds belong to the model as its library made it. So that they do, calibration is given what the
model itself takes, and only what attacks see is wrapped.
"""

from typing import Any

import torch
from torch import Tensor, nn

Channels = tuple[float, ...]
Normalization = tuple[Channels, Channels]  # mean and standard deviation of each channel, of pixels in [0, 1]

# a name for --normalize -> mean and standard deviation by channel
NORMALIZATIONS: dict[str, Normalization | None] = {
    "none": None,
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5,), (0.5,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
}


def normalization(text: str) -> Normalization | None:
    """A name of `NORMALIZATIONS`, or "MEAN,.../STD,...": a number for all channels, or one for each.

    ValueError for anything else.
    """
    if text in NORMALIZATIONS:
        return NORMALIZATIONS[text]
    try:
        mean, std = (tuple(float(value) for value in part.split(",")) for part in text.split("/"))
    except ValueError:
        names = ", ".join(NORMALIZATIONS)
        raise ValueError(f"normalize={text!r}: choose one of {names}, or write MEAN,.../STD,... by channel") from None
    if len(mean) != len(std) or not all(0 < value < float("inf") for value in std):
        raise ValueError(f"normalize={text!r}: as many deviations as means, each above 0")
    return mean, std


class Classifier(nn.Module):
    """Images in [0, 1], (n, channels, height, width) -> logits (n, classes), by a model that takes other input.

    normalize: applied to the images first. keyword: the model's name for its input, where that is not its first
    argument. An output with `.logits`, as Hugging Face's models give, is taken apart.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, model: nn.Module, normalize: Normalization | None = None, keyword: str = "") -> None:
        super().__init__()
        self.model, self.keyword = model, keyword
        for name, values in zip(("mean", "std"), normalize or (None, None), strict=True):
            value = None if values is None else torch.tensor(values).view(1, -1, 1, 1)
            self.register_buffer(name, value, persistent=False)
        self.training = model.training  # and no module of its own in another mode than it is in

    def inputs(self, x: Tensor) -> Any:
        """What the model is given for these images: a batch as `calibrate` takes it."""
        x = x if self.mean is None else (x - self.mean) / self.std
        return {self.keyword: x} if self.keyword else x

    def forward(self, x: Tensor) -> Tensor:
        given = self.inputs(x)
        out = self.model(**given) if self.keyword else self.model(given)
        return getattr(out, "logits", out)
