"""forged-fx demo"""

from pathlib import Path
from typing import Annotated

import typer

from forged_fx.cli import options

EXAMPLE = "forged-fx demo --out demo"


def run(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of training and attacks.")] = 0,
    n: Annotated[int, typer.Option("-n", min=1, max=200, help="Test images.")] = 200,
    json: options.Json = False,
) -> None:
    """Train on real handwritten digits, forge, compile, attack, write a page about it: about a minute and a half."""
    import contextlib
    import sys

    from forged_fx import demo
    from forged_fx.cli import output
    from forged_fx.evaluate.record import headline

    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        found = demo.run(out, seed, n)
    if json:
        output.show({"out": str(out), "headline": headline(found.result)}, "", True)
