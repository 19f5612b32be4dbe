"""forged-fx bench"""

from typing import Annotated

import typer

from forged_fx.cli import options

EXAMPLE = (
    "forged-fx bench forged_fx.digits:cnn --weights random --stats demo/stats.safetensors --data digits --batch 8 "
    "--modes eager --rounds 3"
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
    batch: Annotated[int, typer.Option(min=1, help="Images in the batch that is timed.")] = 8,
    modes: Annotated[str, typer.Option(help="eager, compiled, or both.")] = "eager,compiled",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in turn.")] = 15,
    folder: options.Beside = None,
    weights: options.Weights = None,
    normalize: options.Normalize = None,
    resize: options.Resize = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Time the forged model beside the plain one, in turn, on one batch. A figure of 1: forging is free."""
    from forged_fx import throughput
    from forged_fx.cli import given, output
    from forged_fx.evaluate.fingerprint import of_forging
    from forged_fx.files import FIGURES
    from forged_fx.models import device_of
    from forged_fx.report.run import SPEEDS, save_speeds

    chosen = options.names(modes)
    if unknown := [mode for mode in chosen if mode not in throughput.MODES]:
        raise typer.BadParameter(f"--modes {unknown[0]}: choose from {', '.join(throughput.MODES)}")
    output.check(lambda _: FIGURES, run=folder, name=SPEEDS)
    found = given.model(model, weights, normalize, device)
    x, _ = given.images(data, None, resize, usual="train").batches(batch)[0]
    if len(x) < batch:
        raise typer.BadParameter(f"--batch {batch}: {data} has {len(x)} images")
    forged = given.forged(found, stats, ratio, kind, where, statistic, include, exclude, x)
    pair = (found.classifier(), found.classifier(forged))
    speeds = throughput.compare(*pair, x.to(device_of(forged)), rounds=rounds, modes=chosen)
    document = {"batch": len(x), "rounds": rounds, "speeds": [vars(speed) for speed in speeds]}
    try:
        output.show(document, throughput.text(speeds), json)
    finally:  # whoever reads what is printed may have enough
        if folder is not None:
            save_speeds(folder, speeds, of_forging(forged))
