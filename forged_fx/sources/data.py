"""Where images come from, by name: a table with a row per prefix.

Every image is float32 in [0, 1], (channels, height, width); normalisation belongs to the model. To add a source: a
function, and a row in `DATA`.
"""

import difflib
import functools
import gzip
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from forged_fx import checked
from forged_fx.extras import need

SPLITS = ("train", "test")
SHOWN = 12  # classes, by name
_WIDE = ("I", "F")  # modes of PIL's: 16 or 32 bits an element
MANY = 256  # images that have to be decoded: from here on, other processes do it

Decode = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Images(Dataset):
    """Labelled images, decoded when they are asked for.

    items: whatever `decode` makes an image of, uint8 (channels, height, width), or float32 in [0, 1]. labels: (n,)
    int64, or None where there are none. resize: (short side, side of the square cut from the middle), of an image as
    it comes; None: as it is. mixed: the first of them are like the others; else they lie sorted by class, and a part
    is taken evenly. slow: decoding is work. classes: what they are called, by number, where that is known. unsure: why
    the labels may be other numbers than the model's classes, and what to do.
    """

    name: str
    items: Any
    labels: Tensor | None
    decode: Decode
    resize: tuple[int, int] | None = None
    mixed: bool = True
    slow: bool = False
    classes: tuple[str, ...] = ()
    unsure: str = ""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x = self.decode(self.items[index])
        if self.resize is not None:
            x = _resize(x, *self.resize)
        x = x.float().div(255) if x.dtype == torch.uint8 else x.float()
        return x, -1 if self.labels is None else int(self.labels[index])

    @property
    def numbering(self) -> str:
        """Which number stands for which class: "0 ape, 1 bee"; "" where they have no names."""
        named = [f"{number} {checked.visible(name)}" for number, name in enumerate(self.classes)]
        return ", ".join(named if len(named) <= SHOWN else [*named[: SHOWN - 1], "...", named[-1]])

    def taken(self, limit: int | None) -> list[int]:
        """Indices of the first `limit`; of images sorted by class, as many spread evenly."""
        n = len(self)
        if limit is None or limit >= n:
            return list(range(n))
        return list(range(limit)) if self.mixed else [i * n // limit for i in range(limit)]

    def batches(self, size: int, limit: int | None = None) -> "Batches":
        indices = self.taken(limit)
        return Batches(self, [indices[i : i + size] for i in range(0, len(indices), size)])

    def pixels(self, limit: int | None = None) -> Tensor:
        """x (n, channels, height, width), in memory."""
        return torch.cat([x for x, _ in self.batches(MANY, limit)])

    def tensors(self, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """x (n, channels, height, width) and y (n,) int64, in memory. ValueError where there are no labels, or which
        classes they mean is not sure."""
        if self.unsure:
            raise ValueError(self.unsure)
        if self.labels is None:
            raise ValueError(f"{self.name} has no labels: evaluation needs them (in npz: y)")
        x, y = zip(*self.batches(MANY, limit), strict=True)
        return torch.cat(x), torch.cat(y)


@dataclass(frozen=True)
class Batches(Sequence):
    """Batches (x, y) of images; a slice is again one, so that processes can share them out."""

    images: Images
    indices: list[list[int]]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return Batches(self.images, self.indices[which])
        return next(iter(Batches(self.images, [self.indices[which]])))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        workers = min(8, os.cpu_count() or 1) if self.images.slow and sum(map(len, self.indices)) >= MANY else 0
        loader = DataLoader(self.images, batch_sampler=self.indices, num_workers=workers, collate_fn=_stack)
        try:
            yield from loader
        except ValueError as error:  # of another process's, the traceback comes in front
            _, traceback, said = str(error).rstrip().rpartition("\nValueError: ")
            if not traceback:
                raise
            raise ValueError(said) from None


@dataclass(frozen=True)
class Inputs(Sequence):
    """What a model is given for batches of images, which are made when they are asked for. give: see `Model.inputs`."""

    batches: Batches
    give: Callable[[Tensor], Any]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, which: Any) -> Any:
        return Inputs(self.batches[which], self.give) if isinstance(which, slice) else self.give(self.batches[which][0])

    def __iter__(self) -> Iterator[Any]:
        return (self.give(x) for x, _ in self.batches)


def _stack(pairs: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*pairs, strict=True)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        some = " and ".join(" x ".join(map(str, shape)) for shape in sorted(shapes)[:2])
        raise ValueError(f"images of different sizes ({some}): give --resize SIDE, or --resize SIDE,CROP")
    return torch.stack(images), torch.tensor(labels)


def load_data(name: str, split: str | None = None, resize: str | None = None) -> Images:
    """Images by name.

    Args:
        name: "digits", "npz:FILE" (arrays x and y), "imagefolder:DIR" (a folder per class),
            "imagefolder-as-text:DIR" or "imagefolder-as-numbers:DIR", "cifar10:DIR", "mnist:DIR" or "hf:NAME".
            Classes are numbered in the order of their folders' names, as torchvision's ImageFolder does. Where all are
            whole numbers, and text has another order than numbers (1, 10, 2), which of the two a model was trained
            with cannot be seen, and labels take the second name (as text, as ImageFolder did) or the third (by number).
        split: "train" or "test", of those that have both. None: "train".
        resize: "SIDE" or "SIDE,CROP": the short side becomes SIDE, then the middle CROP x CROP is cut out (SIDE x
            SIDE if none is given); bilinear, with antialiasing.

    Raises:
        ValueError, ImportError, FileNotFoundError: one line, with the next step.
    """
    source, rest, sides = asked(name, split, resize)
    images = source.make(rest, split or SPLITS[0])
    if not len(images):
        raise ValueError(f"{name} holds no image")
    return replace(images, name=name, resize=sides)


def asked(name: str, split: str | None, resize: str | None) -> tuple["DataSource", str, tuple[int, int] | None]:
    """Which source a name is of, the rest of the name, and the sides: what can be told before anything is looked for.

    ValueError where `load_data` would not understand it.
    """
    prefix, _, rest = name.partition(":")
    source = DATA.get(prefix)
    if source is None or bool(rest) is (source.form == prefix):
        close = difflib.get_close_matches(prefix, DATA, n=1) if source is None else []
        hint = f"did you mean {DATA[close[0]].form}? Else " if close else ""
        forms = ", ".join(source.form for source in DATA.values())
        raise ValueError(f"{name!r} names no data: {hint}write one of {forms}")
    if split not in (None, *SPLITS):
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
    if split is not None and not source.splits:
        raise ValueError(f"{name} has no splits: leave out split={split!r}, and name the images themselves")
    return source, rest, None if resize is None else _sides(resize)


def _sides(text: str) -> tuple[int, int]:
    try:
        sides = [int(part) for part in text.split(",")]
    except ValueError:
        sides = []
    if not 1 <= len(sides) <= 2 or min(sides) < 1 or sides[-1] > sides[0]:
        raise ValueError(f"resize={text!r}: write SIDE or SIDE,CROP in pixels, such as 224 or 256,224")
    return sides[0], sides[-1]


def _resize(x: Tensor, side: int, crop: int) -> Tensor:
    functional = need("torchvision.transforms.v2", "models").functional
    return functional.center_crop(functional.resize(x, [side], antialias=True), [crop, crop])


def _digits(_: str, split: str) -> Images:
    from forged_fx import digits

    x_train, y_train, x_test, y_test = digits.load()
    x, y = (x_train, y_train) if split == "train" else (x_test, y_test)
    return Images("digits", x, y, decode=_as_it_is)


def _npz(file: str, _: str) -> Images:
    try:
        arrays = np.load(file, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it is a single array")
        with arrays:
            found = {key: arrays[key] for key in ("x", "y") if key in arrays}
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {file}") from None
    except Exception as error:  # a damaged archive fails in every way there is
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} cannot be read as npz ({reason}): numpy.savez(FILE, x=images, y=classes)") from error
    if "x" not in found:
        raise ValueError(f"{file} has no array x: numpy.savez(FILE, x=images, y=classes)")
    x, y = found["x"], found.get("y")
    if x.dtype == np.uint8:
        if x.size and x.max() == 1:
            raise ValueError(
                f"{file}: x is uint8 and holds 0 and 1 alone, where 255 is white: multiply by 255, or make it float32"
            )
    elif x.dtype.kind == "f" and x.size and 0 <= x.min() and x.max() <= 1:
        x = x.astype(np.float32)
    else:
        seen = f", and spans [{x.min():g}, {x.max():g}]" if x.dtype.kind in "fiu" and x.size else ""
        raise ValueError(f"{file}: x must be uint8, or float in [0, 1]; it is {x.dtype}{seen}")
    if x.ndim == 3:
        x = x[:, None]
    first, last = (x.ndim == 4 and x.shape[i] in (1, 3, 4) for i in (1, 3))
    if first == last:
        raise ValueError(
            f"{file}: x has shape {x.shape}; expected (n, h, w), (n, h, w, channels) or (n, channels, h, w)"
        )
    x = x if first else x.transpose(0, 3, 1, 2)
    if y is not None and (y.shape != (len(x),) or y.dtype.kind not in "iu"):
        raise ValueError(f"{file}: y has shape {y.shape} and type {y.dtype}; expected ({len(x)},) integers")
    return _of_arrays(file, x, y)


def _of_arrays(name: str, x: np.ndarray, y: np.ndarray | None) -> Images:
    labels = None if y is None else torch.from_numpy(y.astype(np.int64))
    mixed = labels is None or not bool((labels.diff() >= 0).all())
    return Images(name, torch.from_numpy(np.ascontiguousarray(x)), labels, decode=_as_it_is, mixed=mixed)


def _as_it_is(image: Tensor) -> Tensor:
    return image


def _image_folder(folder: str, _: str, order: Callable[[str], Any] | None = None) -> Images:
    """order: what folders' names are sorted by; None: as text, and if as numbers they come in another order, who needs
    the labels has to say which."""
    datasets = need("torchvision", "models").datasets
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    try:
        found = datasets.ImageFolder(folder)
    except FileNotFoundError as error:
        raise ValueError(f"{folder}: {error}".partition("\n")[0] + "; it needs a folder per class") from error
    as_text = found.classes
    words = [name for name in as_text if not (name.isascii() and name.isdigit())]
    if order is int and words:
        raise ValueError(f"{folder}: its folder {words[0]!r} is no whole number: write imagefolder:{folder}")
    classes = sorted(as_text, key=order or (str if words else int))
    unsure = ""
    if order is None and classes != as_text:
        unsure = (
            f"{folder}: its folders are numbers, which sort as text ({_first(as_text)}: so torchvision's ImageFolder "
            f"numbers classes) otherwise than as numbers ({_first(classes)}): write imagefolder-as-text:{folder} if "
            f"the model was trained on ImageFolder's classes, imagefolder-as-numbers:{folder} if its classes count up"
        )
    number = {name: i for i, name in enumerate(classes)}
    paths, labels = zip(*((path, number[as_text[label]]) for path, label in found.samples), strict=True)
    ordered = sorted(range(len(paths)), key=labels.__getitem__)
    return Images(
        folder,
        tuple(paths[i] for i in ordered),
        torch.tensor([labels[i] for i in ordered]),
        decode=_decode,
        mixed=False,
        slow=True,
        classes=() if unsure else tuple(classes),
        unsure=unsure,
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], "..."])


def _decode(image: Any) -> Tensor:
    """A file, or an image of PIL's, as uint8 RGB."""
    pil = need("PIL.Image", "models")
    if isinstance(image, str | os.PathLike):
        try:
            with pil.open(image) as file:
                file.load()
        except Exception as error:  # a damaged file fails in every way there is
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{image} cannot be read as an image ({reason}): replace it, or leave it out") from error
        return _decode(file)
    if image.mode.startswith(_WIDE):
        name = getattr(image, "filename", "") or "an image"
        raise ValueError(
            f"{name} has more than 8 bits a channel (mode {image.mode}), and whatever is above 255 would be lost: "
            "convert it, or give the images as npz:FILE, float in [0, 1]"
        )
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _decode_column(column: str, row: Any) -> Tensor:
    return _decode(row[column])


def _cifar10(folder: str, split: str) -> Images:
    """The binary version, a file of 3,073 bytes an image; or the Python version, which is pickled, by torchvision: it
    opens only the files that were published, known by their digests."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    binary = _within(folder, [f"{name}.bin" for name in names], ("", "cifar-10-batches-bin"))
    if binary:
        rows = np.concatenate([np.fromfile(path, np.uint8) for path in binary])
        if rows.size % 3073:
            raise ValueError(f"{binary[0].parent} is not CIFAR-10's binary version: no whole number of images")
        rows = rows.reshape(-1, 3073)
        return _of_arrays(folder, rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0])
    if not _within(folder, names, ("cifar-10-batches-py",)):
        raise FileNotFoundError(
            f"{folder} holds neither cifar-10-batches-bin nor cifar-10-batches-py: unpack CIFAR-10's archive there"
        )
    try:
        found = need("torchvision", "models").datasets.CIFAR10(folder, train=split == "train", download=False)
    except RuntimeError as error:
        raise ValueError(
            f"{folder}/cifar-10-batches-py is not as published, and is pickled, so it is not opened: unpack the "
            "archive anew, or take the binary version"
        ) from error
    return _of_arrays(folder, found.data.transpose(0, 3, 1, 2), np.array(found.targets))


def _mnist(folder: str, split: str) -> Images:
    """The published IDX files, compressed or not."""
    start = "train" if split == "train" else "t10k"
    parts = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        names = [f"{start}-{kind}-ubyte", f"{start}-{kind}-ubyte.gz"]
        found = [p for name in names for p in _within(folder, [name], ("", "raw", "MNIST/raw"))]
        if not found:
            raise FileNotFoundError(f"{folder} holds no {names[0]}(.gz), one of MNIST's four files")
        parts.append(_idx(found[0], dimensions))
    x, y = parts
    if len(x) != len(y):
        raise ValueError(f"{folder}: {len(x)} images and {len(y)} labels")
    return _of_arrays(folder, x[:, None], y)


def _idx(path: Path, dimensions: int) -> np.ndarray:
    data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    shape = np.frombuffer(data[4 : 4 + 4 * dimensions], ">u4").astype(int)
    values = np.frombuffer(data[4 + 4 * dimensions :], np.uint8).copy()
    if data[:4] != bytes((0, 0, 8, dimensions)) or values.size != shape.prod():
        raise ValueError(f"{path} is no IDX file of {dimensions} dimensions, or not whole: download it anew")
    return values.reshape(shape)


def _within(folder: str, names: list[str], below: Sequence[str]) -> list[Path]:
    """The files of these names in the first of these folders that has them all; none if no folder does."""
    for part in below:
        paths = [Path(folder) / part / name for name in names]
        if all(path.is_file() for path in paths):
            return paths
    return []


def _hugging_face(name: str, split: str) -> Images:
    datasets = need("datasets", "hf")
    try:
        parts = datasets.load_dataset(name)
    except Exception as error:  # each version has its own for a network that is not there
        reason = (str(error) or type(error).__name__).partition("\n")[0]
        raise ValueError(
            f"hf:{name} could not be loaded ({type(error).__name__}: {reason[:200]}): on a machine with a network, "
            "datasets.load_dataset(NAME).save_to_disk keeps it, or write its images to a folder per class"
        ) from error
    wanted = [name for name in ((split,) if split == "train" else ("test", "validation", "valid")) if name in parts]
    if not wanted:
        raise ValueError(f"hf:{name} has no split for {split!r}: it has {', '.join(parts)}")
    rows = parts[wanted[0]]
    image, label = (
        next((column for column, feature in rows.features.items() if type(feature).__name__ == kind), None)
        for kind in ("Image", "ClassLabel")
    )
    if image is None:
        raise ValueError(f"hf:{name} has no column of images: its columns are {', '.join(rows.features)}")
    labels = None if label is None else torch.tensor(rows[label][:])
    return Images(name, rows, labels, decode=functools.partial(_decode_column, image), mixed=False, slow=True)


@dataclass(frozen=True)
class DataSource:
    """make(rest of the name, split). splits: it has a training and a test part."""

    make: Callable[[str, str], Images]
    form: str
    what: str
    splits: bool = False


DATA: dict[str, DataSource] = {
    "digits": DataSource(_digits, "digits", "scikit-learn's 1,797 handwritten digits, 8 x 8", splits=True),
    "npz": DataSource(_npz, "npz:FILE", "arrays x (uint8, or float in [0, 1]) and y"),
    "imagefolder": DataSource(_image_folder, "imagefolder:DIR", "a folder of images per class"),
    "imagefolder-as-text": DataSource(
        functools.partial(_image_folder, order=str),
        "imagefolder-as-text:DIR",
        "the same; folders called by numbers count as text does: 1, 10, 2",
    ),
    "imagefolder-as-numbers": DataSource(
        functools.partial(_image_folder, order=int),
        "imagefolder-as-numbers:DIR",
        "the same; folders called by numbers count up: 1, 2, 10",
    ),
    "cifar10": DataSource(_cifar10, "cifar10:DIR", "CIFAR-10 as published", splits=True),
    "mnist": DataSource(_mnist, "mnist:DIR", "MNIST as published", splits=True),
    "hf": DataSource(_hugging_face, "hf:NAME", "a data set of Hugging Face's hub, or its folder", splits=True),
}
