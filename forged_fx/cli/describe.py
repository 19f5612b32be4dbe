"""forged-fx describe"""

import warnings
from typing import Annotated

import typer

from forged_fx.cli import options

EXAMPLE = (
    "forged-fx describe forged_fx.digits:cnn --weights demo/model.safetensors --stats demo/stats.safetensors "
    "--data digits"
)


def run(
    context: typer.Context,
    model: options.Model,
    stats: options.Stats,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Images: two of them audit the forged model, and show its cost.")
    ] = None,
    ratio: options.Ratio = None,
    kind: options.Kind = options.KIND,
    where: options.Where = options.WHERE,
    statistic: options.Statistic = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    cost: Annotated[bool, typer.Option(help="What each threshold costs in compiled code; takes --data.")] = False,
    weights: options.Weights = None,
    normalize: options.Normalize = None,
    resize: options.Resize = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Say, site by site, what forging does to a model: threshold, share zeroed, or why a site is left out.

    Of the inputs seen in calibration, --json has two shares. net_zeroed: what forging zeroes, as in the table's column.
    share_zeroed: what is 0 behind the threshold, so with what was 0 already (behind a ReLU).
    """
    import forged_fx
    from forged_fx.cli import given, output

    if cost and data is None:
        raise typer.BadParameter("--cost looks at a forward pass: give it images with --data")
    if data is None:
        options.refuse(context, ["resize"], "is of images, and needs --data, which names them")
    found = given.model(model, weights, normalize, device)
    x = None if data is None else given.images(data, None, resize, usual="train").batches(2)[0][0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "forged without an audit")  # the last line says so
        forged = given.forged(found, stats, ratio, kind, where, statistic, include, exclude, x)
    example = None if x is None else given.arguments(found, x)
    rows = forged_fx.describe(forged, cost=cost, example=example)
    document = {
        "sites": [{**vars(row), "cost": None if row.cost is None else str(row.cost)} for row in rows],
        "elsewhere": rows.elsewhere,
        "notes": rows.notes,
    }
    output.show(document, str(rows), json)
