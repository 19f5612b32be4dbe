"""Where models come from, by name: a table with a row per prefix.

To add a source: a function, and a row in `MODELS`.
"""

import copy
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forged_fx.extras import need
from forged_fx.models import device_of
from forged_fx.sources import robustbench
from forged_fx.sources.classifier import Classifier, Normalization, normalization
from forged_fx.sources.exported import load_program
from forged_fx.sources.weights import load_weights

RANDOM = "random"  # in place of a file of weights


@dataclass(frozen=True)
class Model:
    """A model, and what has to be known to show it images.

    module: as its library made it, in eval mode. normalize: mean and standard deviation by channel that it expects, of
    pixels in [0, 1]; None: pixels as they are. keyword: its name for its input, where that is not its first argument.
    size: the side, in pixels, of the images that it was made for; threat: (norm, eps) that it was trained against;
    each None where its source does not say.
    """

    name: str
    module: nn.Module
    normalize: Normalization | None = None
    keyword: str = ""
    size: int | None = None
    threat: tuple[str, float] | None = None

    def classifier(self, module: nn.Module | None = None) -> nn.Module:
        """Images in [0, 1] -> logits: what `evaluate` takes. module: in this one's place, its forged copy say."""
        module = self.module if module is None else module
        return Classifier(module, self.normalize, self.keyword).to(device_of(module)) if self._wrapped else module

    def inputs(self, x: Tensor) -> Any:
        """Images in [0, 1] as a batch that `calibrate` takes: as the module is given them."""
        return Classifier(nn.Identity(), self.normalize, self.keyword).to(x.device).inputs(x)

    @property
    def _wrapped(self) -> bool:
        return self.normalize is not None or bool(self.keyword)


def _fill(model: Model, path: Path) -> Model:
    load_weights(model.module, path)
    return model


@dataclass(frozen=True)
class Source:
    """make(rest of the name, trained): the model with its own weights, or as it is initialised.

    form: how the name is written. own: the weights come with the model, so that none have to be fetched; such a model
    takes no others where it is `whole`. fill(model, rest of the name, file): with a file's weights.
    """

    make: Callable[[str, bool], Model]
    form: str
    what: str
    own: bool = False
    whole: bool = False
    fill: Callable[[Model, str, Path], Model] = lambda model, rest, path: _fill(model, path)


def load_model(
    name: str,
    weights: str | os.PathLike[str] | None = None,
    normalize: str | None = None,
    device: str | torch.device = "cpu",
) -> Model:
    """A model by name, in eval mode.

    Args:
        name: "timm:NAME", "torchvision:NAME", "robustbench:DATA/NORM/NAME", "hf:NAME_OR_FOLDER", "FILE.pt2" or
            "package.module:function", a function that returns a module.
        weights: a file (see `load_weights`); "random": as initialised, from seed 0; None: the source's own, which most
            sources fetch from the network.
        normalize: see `classifier.normalization`. None: as the source says, which it cannot of a file's weights.
        device: where it is put.

    Raises:
        ValueError, ImportError, FileNotFoundError: one line, with the next step.
    """
    source, rest = asked(name)
    if source.whole and weights is not None:
        raise ValueError(f"{name} holds its weights: leave out weights={os.fspath(weights)!r}")
    if weights is None and not source.own:
        model = _fetch(source, name, rest)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = source.make(rest, False)
    if weights not in (None, RANDOM):
        model = source.fill(model, rest, Path(weights))
        if normalize is None and model.normalize is not None:
            raise ValueError(
                f"how are the inputs of {name} normalised with these weights? Give normalize: 'imagenet', 'none' (it "
                "does so itself), or MEAN,.../STD,..."
            )
    if normalize is not None:
        model = replace(model, normalize=normalization(normalize))
    model.module.to(device).eval()
    return replace(model, name=name)


def asked(name: str) -> tuple[Source, str]:
    """Which source a name is of, and the rest of the name, before anything is looked for. ValueError for no name."""
    prefix, colon, rest = name.partition(":")
    if colon and rest and prefix in MODELS:
        return MODELS[prefix], rest
    if name.endswith(".pt2"):
        return PROGRAM, name
    if colon and rest and all(part.isidentifier() for part in prefix.split(".")):
        return FUNCTION, name
    raise ValueError(f"{name!r} names no model: write one of {_forms()}")


def _forms() -> str:
    return ", ".join(source.form for source in (*MODELS.values(), PROGRAM, FUNCTION))


def _fetch(source: Source, name: str, rest: str) -> Model:
    try:
        return source.make(rest, True)
    except (ImportError, NoSuchName, OtherImages):
        raise
    except Exception as error:  # each hub has its own for a network that is not there
        reason = (str(error) or type(error).__name__).strip().partition("\n")[0]
        if name.startswith("hf:"):  # whose networks are described there, too
            how = "is the name right? A folder that holds it is hf:DIR"
        else:
            how = f"give --weights FILE, or --weights {RANDOM} for what does not depend on them"
        raise ValueError(
            f"the weights of {name} could not be fetched ({type(error).__name__}: {reason[:200]}): {how}"
        ) from error


class NoSuchName(ValueError):
    """The library knows no model of that name."""


class OtherImages(ValueError):
    """The model is given something else than normalised images."""


def _known(name: str, names: Iterable[str], where: str) -> None:
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"it has {len(names)}, such as {', '.join(names[:3])}"
        raise NoSuchName(f"{where} has no model {name!r}: {hint}")


def _timm(name: str, trained: bool) -> Model:
    timm = need("timm", "models")
    _known(name.partition(".")[0], timm.list_models(), "timm")
    module = timm.create_model(name, pretrained=trained)
    config = module.pretrained_cfg
    return Model(name, module, (tuple(config["mean"]), tuple(config["std"])), size=config["input_size"][-1])


def _torchvision(name: str, trained: bool) -> Model:
    models = need("torchvision", "models").models
    _known(name, models.list_models(), "torchvision")
    weights = models.get_model_weights(name).DEFAULT
    module = models.get_model(name, weights=weights if trained else None)
    as_trained = weights.transforms()
    if not hasattr(as_trained, "crop_size"):  # detection, segmentation, optical flow take images otherwise
        return Model(name, module)
    size = as_trained.crop_size[-1]
    return Model(name, module, (tuple(as_trained.mean), tuple(as_trained.std)), size=size)


def _hugging_face(name: str, trained: bool) -> Model:
    transformers = need("transformers", "hf")
    kind = transformers.AutoModelForImageClassification
    folder = {"local_files_only": True} if Path(name).is_dir() else {}
    if trained:
        module = kind.from_pretrained(name, use_safetensors=True, **folder)
    else:
        module = kind.from_config(transformers.AutoConfig.from_pretrained(name, **folder))
    processor = transformers.AutoImageProcessor.from_pretrained(name, **folder)
    given = (getattr(processor, key, None) for key in ("image_mean", "image_std"))
    mean, std = (None if value is None else tuple(value) for value in given)
    normalize = (mean, std) if mean and std and getattr(processor, "do_normalize", True) else None
    if trained and not _only_normalizes(processor, normalize):
        raise OtherImages(
            f"hf:{name}: its {type(processor).__name__} makes other inputs of images in [0, 1] than a normalisation "
            "does (swaps channels, say, or cuts out patches): write a function that returns a module which does this "
            "and then calls the model, and name that, package.module:function"
        )
    return Model(name, module, normalize, "pixel_values", size=getattr(module.config, "image_size", None))


def _only_normalizes(processor: Any, normalize: Normalization | None) -> bool:
    """Whether a processor does no more than this to an image that has the right size: tried on one."""
    image = torch.randint(256, (3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    size = ("do_resize", "do_center_crop", "do_pad", "do_thumbnail", "do_align_long_axis")
    off = {key: False for key in size if hasattr(processor, key)}
    try:
        made = processor(images=image, return_tensors="pt", **off)["pixel_values"]
    except Exception:  # each has its own for what it lacks
        return False
    wanted = Classifier(nn.Identity(), normalize).inputs(image[None] / 255)
    return made.shape == wanted.shape and torch.allclose(made.float(), wanted, atol=1e-3)


# RobustBench's data set -> the side of its images; its norm -> eps of its list, by data set
_SIDES = {"cifar10": 32, "cifar100": 32, "imagenet": 224}
_EPS = {
    ("cifar10", "Linf"): 8 / 255,
    ("cifar100", "Linf"): 8 / 255,
    ("imagenet", "Linf"): 4 / 255,
    ("cifar10", "L2"): 0.5,
    ("imagenet", "L2"): 3.0,
}


def _robustbench(name: str, trained: bool) -> Model:
    data, norm, which = _entry(name)
    module = (
        robustbench.load(data, norm, which) if trained else robustbench.architectures()[data, norm][which]["model"]()
    )
    eps = _EPS.get((data, norm))
    return Model(name, module, size=_SIDES.get(data), threat=None if eps is None else (norm, eps))


def _entry(name: str) -> tuple[str, str, str]:
    parts = name.split("/")
    data, norm, which = parts if len(parts) == 3 else ("cifar10", "Linf", name)
    lists = robustbench.architectures()
    if (data, norm) not in lists:
        known = ", ".join("/".join(pair) for pair in lists)
        raise NoSuchName(f"robustbench has no list {data}/{norm}: its lists are {known}")
    _known(which, lists[data, norm], f"robustbench's {data}/{norm}")
    return data, norm, which


def _fill_robustbench(model: Model, name: str, path: Path) -> Model:
    """A checkpoint as RobustBench publishes it is read by RobustBench's code, which knows what it was saved from."""
    if path.suffix == ".safetensors":
        return _fill(model, path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} with weights")
    return replace(model, module=robustbench.load(*_entry(name), path))


def _function(name: str, trained: bool) -> Model:
    where, _, what = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:  # an installed script does not look where it is called
        sys.path.append(os.getcwd())
    try:
        function = importlib.import_module(where)
        for part in what.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: {error}. A model is named as one of {_forms()}") from error
    module = function
    if callable(function) and not isinstance(function, nn.Module):
        try:
            inspect.signature(function).bind()
        except TypeError as error:
            raise TypeError(f"{name} is called without arguments, and is {error}: name a function of none") from error
        except ValueError:  # what is not written in Python does not say what it takes
            pass
        try:
            module = function()
        except Exception as error:
            error.add_note(f"raised by {name}")
            raise
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} gives {type(module).__name__}: it must be a function that returns an nn.Module")
    return Model(name, copy.deepcopy(module))  # the function may give others the same one, or be the module itself


def _program(path: str, trained: bool) -> Model:
    return Model(path, load_program(path))


MODELS: dict[str, Source] = {
    "timm": Source(_timm, "timm:NAME", "a model of timm"),
    "torchvision": Source(_torchvision, "torchvision:NAME", "a model of torchvision"),
    "robustbench": Source(
        _robustbench, "robustbench:DATA/NORM/NAME", "an entry of RobustBench's lists", fill=_fill_robustbench
    ),
    "hf": Source(_hugging_face, "hf:NAME_OR_FOLDER", "an image classifier of Hugging Face's transformers"),
}
PROGRAM = Source(_program, "FILE.pt2", "a program that torch.export saved", own=True, whole=True)
FUNCTION = Source(_function, "package.module:function", "a function that returns an nn.Module", own=True)
