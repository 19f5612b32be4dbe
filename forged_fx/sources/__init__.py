"""Models and images by name: `load_model("timm:resnet18")`, `load_data("cifar10:DIR")`.

    models.py      where models come from, a table with a row per prefix
    data.py        where images come from, a table with a row per prefix
    classifier.py  what stands between an image in [0, 1] and a model: normalisation, the name of its input
    weights.py     weights from a file, of which nothing is executed
    exported.py    programs that torch.export saved

The libraries behind the prefixes are imported when a name asks for them.
"""

from forged_fx.sources.data import DATA, Batches, Images, Inputs, load_data
from forged_fx.sources.models import MODELS, Model, load_model

__all__ = ["DATA", "MODELS", "Batches", "Images", "Inputs", "Model", "load_data", "load_model"]
