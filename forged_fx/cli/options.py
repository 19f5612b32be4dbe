"""Arguments that several commands take, and how numbers are written: 1/64, 2**-6, 8/255, 0.015625."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

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
        help="safetensors, or what torch.save wrote (read with weights_only), FILE:KEY where it holds several sets; "
        "random: as initialised. Without it: the source's own.",
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
        metavar="DATA",
        help="digits, npz:FILE, imagefolder:DIR (or imagefolder-as-text:, imagefolder-as-numbers:), cifar10:DIR, "
        "mnist:DIR, or hf:NAME; pixels in [0, 1].",
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
    str | None,
    typer.Option(
        metavar="RATIO",
        help="Inputs below this share of the largest become 0: 2**-6, 1/64; for kind band LOW:HIGH; off: as it was. By "
        "site: '7=0,*=2**-6' (* is every other), 'layer1.*=2**-7,*=2**-6,head=off'; a site's own name counts first, "
        "then the first glob that matches. Without it: the kind's own, 2**-6 for hard.",
    ),
]
Kind = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help="hard, one_sided, shifted, soft, clamp, band or mean (docs/kinds.md), or by site: 'conv1=clamp,*=hard'.",
    ),
]
Where = Annotated[str, typer.Option(metavar="WHERE", help="linear+conv, activations, or sites: GLOB,GLOB,...")]
Statistic = Annotated[
    str | None, typer.Option(metavar="S", help="What a ratio is a share of: max, or quantile(0.999). Without it: max.")
]
Include = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Forge only these sites; may be repeated.")]
Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Do not forge these; may be repeated.")]
Graph = Annotated[
    bool,
    typer.Option(
        "--graph/--no-graph",
        help="One graph where that is exactly the model, or module by module, so that every module runs.",
    ),
]
Eps = Annotated[str, typer.Option(help="Radius of the attacker's ball, of pixels in [0, 1]: 8/255, ...")]
Calibrate = Annotated[
    str | None, typer.Option(metavar="DATA", help="What to calibrate on. Without it: --data, its training images.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images that the models are fed at a time.")]


def _folder(given: str) -> Path:
    if not given:
        raise typer.BadParameter("it names no folder: write . if you mean the one you are in")
    return Path(given)


Folder = Annotated[
    Path | None,
    typer.Option(parser=_folder, metavar="DIR", help="Record the run here; the same command goes on with it."),
]
Beside = Annotated[
    Path | None,
    typer.Option(parser=_folder, metavar="DIR", help="A run of evaluate, whose page is to show the figures."),
]
Save = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write FILE.json, .csv, .svg, .png or .pdf.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]

KIND, WHERE = "hard", "linear+conv"

_NUMBER = r"[0-9.]+(?:e[-+]?[0-9]+)?"
_FORMS: dict[str, Callable[..., float]] = {
    rf"({_NUMBER})": lambda a: a,
    rf"({_NUMBER})/({_NUMBER})": lambda a, b: a / b,
    rf"({_NUMBER})(?:\*\*|\^)(-?[0-9]+)": lambda a, b: a**b,
}


def refuse(context: typer.Context, names: Iterable[str], need: str) -> None:
    """typer.BadParameter if any of these parameters was given. need: what it says, and of which option it would be."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise typer.BadParameter(f"--{name.replace('_', '-')} {need}")


def number(text: str, what: str) -> float:
    """The number that `text` writes; typer.BadParameter if it writes none."""
    for form, value in _FORMS.items():
        if match := re.fullmatch(form, text.strip(), flags=re.IGNORECASE):
            try:
                return value(*(float(part) for part in match.groups()))
            except (ValueError, ArithmeticError):
                break
    if re.match(r"-[0-9.]", text.strip()):
        raise typer.BadParameter(f"{what} {text!r} is negative: give a number of 0 or more")
    raise typer.BadParameter(f"{what} {text!r} is no number: write it like 0.015625, 1/64 or 2**-6")


def ratio(text: str) -> Any:
    """A ratio as `forged_fx.transform` takes it: a number, a pair, None for "off", or one of them by site."""
    return by_site(text, lambda value: _ratio(value.strip()), "ratio")


def ratios(text: str) -> Any:
    """Ratios as `forged_fx.sweep` takes them: a list, or by kind where each kind's begin with "KIND="."""
    by_kind: dict[str, list[Any]] = {}
    kind = ""
    for part in text.split(","):
        name, given, value = part.rpartition("=")
        kind = name.strip() if given else kind
        by_kind.setdefault(kind, []).append(_ratio(value.strip()))
    if list(by_kind) == [""]:
        return by_kind[""]
    from forged_fx.kinds import KINDS

    if unknown := [kind for kind in by_kind if kind not in KINDS]:
        raise typer.BadParameter(
            f"--ratios: {unknown[0]!r} is no kind. Write 2**-7,2**-6 for every kind, or by kind hard=2**-7,2**-6,"
            "clamp=0.7; a point has one ratio at every site, and --include and --exclude choose sites"
        )
    return by_kind


def names(text: str) -> list[str]:
    """The names that a text lists."""
    return [name.strip() for name in text.split(",")]


def attacks(text: str) -> str | list[str]:
    """A preset's name, or names of attacks."""
    given = names(text)
    return given[0] if len(given) == 1 else given


def kind(text: str) -> str | dict[str, str]:
    """A kind's name, or one by site."""
    return by_site(text, str.strip, "kind")


def by_site(text: str, read: Callable[[str], Any], what: str) -> Any:
    """What one text says for all sites, or "SITE=TEXT,..." by site; typer.BadParameter for a mixture of the two."""
    if "=" not in text:
        return read(text)
    parts = [part.strip() for part in text.split(",")]
    if alone := [part for part in parts if "=" not in part]:
        named = [part for part in parts if part not in alone]
        how = ",".join([*named, f"*={alone[0]}"])  # last: of globs the first that matches counts
        raise typer.BadParameter(f"{what} {text!r}: which site is {alone[0]!r} for? For all others write {how!r}")
    pairs = (part.rpartition("=") for part in parts)
    return {site.strip(): read(value) for site, _, value in pairs}


def _ratio(text: str) -> Any:
    if text == "off":
        return None
    if ":" in text:
        return tuple(_ratio(end.strip()) for end in text.split(":"))
    return number(text, "ratio")
