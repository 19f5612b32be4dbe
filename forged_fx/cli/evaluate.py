"""forged-fx evaluate"""

from pathlib import Path
from typing import Annotated

import typer

from forged_fx.cli import options

EXAMPLE = (
    "forged-fx evaluate forged_fx.digits:cnn --weights demo/model.safetensors --stats demo/stats.safetensors "
    "--ratio 2**-7 --data digits --eps 0.15 --limit 20 --attacks apgd-ce --folder run"
)


FORGING = ("ratio", "kind", "where", "statistic", "include", "exclude", "graph")
OF_BASE = ("base_weights", "base_normalize")


def run(
    context: typer.Context,
    model: options.Model,
    data: options.Data,
    eps: Annotated[
        str | None, typer.Option(help="Radius of the attacker's ball, of pixels in [0, 1]: 8/255, 0.5, ...")
    ] = None,
    norm: Annotated[
        str | None, typer.Option(help="Linf, L2 or L1. Without it: Linf, or what the model's list says.")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What calibrate wrote: judge the forged model beside the plain one."),
    ] = None,
    ratio: options.Ratio = None,
    kind: options.Kind = options.KIND,
    where: options.Where = options.WHERE,
    statistic: options.Statistic = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    graph: options.Graph = True,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Another model to compare with, in the plain one's place.")
    ] = None,
    base_weights: options.Weights = None,
    base_normalize: options.Normalize = None,
    folder: options.Folder = None,
    attacks: Annotated[
        str, typer.Option(help="standard, quick, thorough, adaptive, relentless, or names of attacks: apgd-ce,square")
    ] = "standard",
    seed: Annotated[int, typer.Option(help="Of all attacks.")] = 0,
    batch: options.BatchSize = 250,
    weights: options.Weights = None,
    normalize: options.Normalize = None,
    split: options.Split = None,
    resize: options.Resize = None,
    limit: options.Limit = None,
    device: options.Device = None,
    json: options.Json = False,
) -> int:
    """Attack a model and what it was made from, and say whether it is any more robust. The exit code is the verdict.

    Takes the test images where the data has splits. Interrupted or killed, the same command with the same --folder
    goes on where it was; under torchrun it is shared by all processes, and the result is the same.
    """
    import forged_fx
    from forged_fx.cli import given, output
    from forged_fx.evaluate.record import headline
    from forged_fx.files import FIGURES
    from forged_fx.models import device_of
    from forged_fx.report.run import SITES, save_sites
    from forged_fx.sources import load_model

    if stats is None:
        options.refuse(context, FORGING, "says how to forge, and needs --stats, the file that calibrate wrote")
    if base is None:
        options.refuse(context, OF_BASE, "is of the model to compare with, and needs --base, which names it")
    if folder is not None and stats is not None:
        FIGURES.check(folder / SITES)  # now, and not when all is done
    found = given.model(model, weights, normalize, device)
    of_list = found.threat if found.threat is not None and norm in (None, found.threat[0]) else None
    if eps is None and of_list is None:
        raise typer.BadParameter("--eps: how far may an attacker move each pixel? Such as 8/255 with --norm Linf")
    radius = of_list[1] if eps is None else options.number(eps, "eps")
    images = given.images(data, split, resize, "test", limit)
    x, y = images.tensors(limit)
    beside = device_of(found.module)
    if base is not None:
        other = load_model(base, base_weights, base_normalize, beside).classifier()
    else:
        other = found.classifier() if stats is not None else None
    judged = found.module
    if stats is not None:
        judged = given.forged(found, stats, ratio, kind, where, statistic, include, exclude, x[:2], graph)
    with output.resumable(folder):
        result = forged_fx.evaluate(
            found.classifier(judged),
            other,
            x=x,
            y=y,
            eps=radius,
            norm=norm or (of_list[0] if of_list else "Linf"),
            attacks=options.attacks(attacks),
            seed=seed,
            batch_size=batch,
            folder=folder,
        )
    if folder is not None and stats is not None and output.first():
        save_sites(folder, forged_fx.describe(judged), forged_fx.Stats.load(stats))
    document = {"headline": headline(result), "exit_code": result.exit_code, "folder": folder and str(folder)}
    document |= {"classes": list(images.classes)} if images.classes else {}
    classes = f"\nclasses by folder: {images.numbering}" if images.numbering else ""
    then = f"\nThe page to read: forged-fx report {folder}" if folder is not None else ""
    output.show(document, f"{result}{classes}{then}", json)
    return result.exit_code
