"""forged-fx sparsity"""

from typing import Annotated

import typer

from forged_fx.cli import options

EXAMPLE = (
    "forged-fx sparsity forged_fx.digits:cnn --weights demo/model.safetensors --stats demo/stats.safetensors "
    "--data digits --limit 100"
)


def run(
    model: options.Model,
    stats: options.Stats,
    data: options.Data,
    ratio: options.Ratio = None,
    kind: options.Kind = options.KIND,
    where: options.Where = options.WHERE,
    statistic: options.Statistic = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 128,
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
    """Measure which share of each site's inputs the forged model zeroes, on images that calibration need not have seen.

    Takes the test images where the data has splits. docs/sparsity.md says how to read it.
    """
    import forged_fx
    from forged_fx.cli import given, output
    from forged_fx.report.run import SPARSITY
    from forged_fx.sparsity import Sparsity

    output.check(Sparsity.file, run=folder, name=SPARSITY, save=save)
    found = given.model(model, weights, normalize, device)
    batches = given.images(data, split, resize, "test", limit).batches(batch, limit)
    forged = given.forged(found, stats, ratio, kind, where, statistic, include, exclude, batches[0][0][:2])
    rows = forged_fx.sparsity(forged, (found.inputs(x) for x, _ in batches))
    output.show_and_keep(rows, json, save, folder and folder / SPARSITY)
