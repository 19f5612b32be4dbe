"""Arguments that several commands take, and how numbers are written: 1/64, 2**-6, 8/255, 0.015625."""

import re
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, torchvision:NAME, robustbench:DATA/NORM/NAME, hf:NAME_OR_FOLDER, FILE.pt2, or "
        "package.module:function, which returns a module.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="safetensors, or what torch.save wrote (read with weights_only); random: as initialised. "
        "Without it: the source's own.",
    ),
]
Normalize = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="How the model wants its inputs: imagenet, half, cifar10, cifar100, mnist, none, or MEAN,.../STD,... "
        "Without it: as its source says.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Without it: a GPU if there is one.")]
Data = Annotated[
    str,
    typer.Option(
        metavar="DATA", help="digits, npz:FILE, imagefolder:DIR, cifar10:DIR, mnist:DIR, or hf:NAME; pixels in [0, 1]."
    ),
]
Split = Annotated[
    str | None, typer.Option(help="train or test, of data that has both. Without it: what the command is for.")
]
Resize = Annotated[
    str | None, typer.Option(metavar="SIDE[,CROP]", help="The short side becomes SIDE; the middle square is cut out.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only so many images.")]
Stats = Annotated[Path, typer.Option(metavar="FILE", help="What calibrate wrote.")]
Ratio = Annotated[
    str,
    typer.Option(
        metavar="RATIO",
        help="Inputs below this share of the largest become 0: 2**-6, 1/64, or by site, the first that matches: "
        "'head=0,layer1.*=2**-7,*=2**-6'.",
    ),
]
Include = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Forge only these sites; may be repeated.")]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Do not forge these; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]

RATIO = "2**-6"

_NUMBER = r"[0-9.]+(?:e[-+]?[0-9]+)?"
_FORMS = {
    rf"({_NUMBER})": lambda a: a,
    rf"({_NUMBER})/({_NUMBER})": lambda a, b: a / b,
    rf"({_NUMBER})(?:\*\*|\^)(-?[0-9]+)": lambda a, b: a**b,
}


def number(text: str, what: str) -> float:
    """The number that `text` writes; typer.BadParameter if it writes none."""
    for form, value in _FORMS.items():
        if match := re.fullmatch(form, text.strip(), flags=re.IGNORECASE):
            try:
                return value(*(float(part) for part in match.groups()))
            except (ValueError, ArithmeticError):
                break
    raise typer.BadParameter(f"{what} {text!r} is no number: write it like 0.015625, 1/64 or 2**-6")


def ratio(text: str) -> float | dict[str, float]:
    """A ratio, or one by site: "head=0,*=2**-7"."""
    if "=" not in text:
        return number(text, "ratio")
    pairs = (part.rpartition("=") for part in text.split(","))
    return {site.strip(): number(value, f"ratio of {site!r}:") for site, _, value in pairs}
