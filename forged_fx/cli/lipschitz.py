"""forged-fx lipschitz"""

from typing import Annotated

import typer

from forged_fx.cli import options

EXAMPLE = (
    "forged-fx lipschitz forged_fx.digits:cnn --weights demo/model.safetensors --stats demo/stats.safetensors "
    "--data digits --limit 4 --eps 0.15 --steps 2"
)


def run(
    model: options.Model,
    stats: options.Stats,
    data: options.Data,
    eps: Annotated[str, typer.Option(help="How far the largest step is looked for, Linf.")] = "8/255",
    steps: Annotated[int, typer.Option(min=1, help="Of the climb to it.")] = 20,
    ratio: options.Ratio = None,
    kind: options.Kind = options.KIND,
    where: options.Where = options.WHERE,
    statistic: options.Statistic = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    batch: options.BatchSize = 32,
    save: options.Save = None,
    folder: options.Beside = None,
    weights: options.Weights = None,
    normalize: options.Normalize = None,
    split: options.Split = None,
    resize: options.Resize = None,
    limit: options.Limit = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Measure how strongly the plain and the forged model react to small changes: gains by site, Jacobians, steps.

    Takes the test images where the data has splits. docs/lipschitz.md says how to read it.
    """
    import forged_fx
    from forged_fx.cli import given, output
    from forged_fx.lipschitz import Lipschitz
    from forged_fx.models import device_of
    from forged_fx.report.run import LIPSCHITZ

    output.check(Lipschitz.file, run=folder, name=LIPSCHITZ, save=save)
    found = given.model(model, weights, normalize, device)
    x = given.images(data, split, resize, "test", limit).pixels(limit)
    forged = given.forged(found, stats, ratio, kind, where, statistic, include, exclude, x[:2])
    pair = (found.classifier(), found.classifier(forged))
    radius = options.number(eps, "eps")
    rows = forged_fx.lipschitz(*pair, x.to(device_of(forged)), eps=radius, steps=steps, batch_size=batch)
    output.show_and_keep(rows, json, save, folder and folder / LIPSCHITZ)
