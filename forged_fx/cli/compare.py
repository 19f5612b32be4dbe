"""forged-fx compare"""

from pathlib import Path
from typing import Annotated

import typer

from forged_fx.cli import options

EXAMPLE = "forged-fx compare demo demo"


def run(
    a: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run of evaluate.")],
    b: Annotated[Path, typer.Argument(metavar="OTHER", help="Another, on the same images.")],
    json: options.Json = False,
) -> int:
    """Set two runs side by side, image by image. Exit code 0: OTHER is measurably better; 3: neither; 4: worse;
    6: one looks better, but was attacked otherwise, or beside another base, or attacks on it may have failed."""
    import forged_fx
    from forged_fx.cli import output
    from forged_fx.evaluate.verdict import EXIT_CODES

    found = forged_fx.compare(a, b)
    paired = {name: found.paired(kind) for name, kind in found.figures.items()}
    document = {
        "verdict": found.verdict,
        "names": found.names,
        "figures": {name: {**vars(p), "difference": p.difference} for name, p in paired.items()},
        "flips": [vars(flip) for flip in found.flips],
        "cautions": found.cautions,
    }
    output.show(document, str(found), json)
    return EXIT_CODES[found.verdict]
