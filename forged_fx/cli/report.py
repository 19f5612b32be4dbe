"""forged-fx report"""

from pathlib import Path
from typing import Annotated

import typer

from forged_fx.cli import options

EXAMPLE = "forged-fx report demo --out page.html"


def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run of evaluate, sweep, search or demo.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the page goes. Without it: FOLDER/report.html.")
    ] = None,
    title: Annotated[str, typer.Option(help="The page's first line. Without it: the folder's name.")] = "",
    classes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Names of the classes, one a line, by number."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Write one HTML page about a run: verdict, attacks, layers, pictures, findings; of a sweep or search, what was
    tried. It needs no network."""
    from forged_fx import report
    from forged_fx.cli import output
    from forged_fx.files import PAGE, whole

    to = folder / "report.html" if out is None else out
    PAGE.check(to)
    try:
        names = classes.read_text(encoding="utf-8").splitlines() if classes is not None else []
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes {classes} is no text in UTF-8 ({error}): write it anew") from error
    found = report.load(folder, title, names)
    with whole(to, PAGE) as part:
        part.write_text(report.page(found), encoding="utf-8")
    output.show({"out": str(to), "verdict": found.verdict}, f"{to}: {found.verdict}", json)
