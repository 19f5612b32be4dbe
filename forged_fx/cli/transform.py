"""forged-fx transform"""

from pathlib import Path
from typing import Annotated

import typer

from forged_fx.cli import options

EXAMPLE = (
    "forged-fx transform forged_fx.digits:cnn --weights demo/model.safetensors --stats demo/stats.safetensors "
    "--data digits --ratio 2**-7 --out forged.pt2"
)


def run(
    model: options.Model,
    stats: options.Stats,
    data: options.Data,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="FILE.pt2 (torch.export), FILE.onnx, or FILE.safetensors.")
    ] = Path("forged.pt2"),
    ratio: options.Ratio = None,
    kind: options.Kind = options.KIND,
    where: options.Where = options.WHERE,
    statistic: options.Statistic = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    graph: options.Graph = True,
    weights: options.Weights = None,
    normalize: options.Normalize = None,
    resize: options.Resize = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Write the forged model to a file.

    FILE.pt2 is a program that torch.export.load, AOTInductor and this terminal take; FILE.onnx holds no operator of
    this library; FILE.safetensors the weights and thresholds by name. The image size is that of the data, the
    batch size is free; inputs are the model's own, normalised if it wants that. An audit runs on two of the images.
    """
    import forged_fx
    from forged_fx.cli import given, output
    from forged_fx.cli.formats import FORMATS
    from forged_fx.models import device_of
    from forged_fx.thresholds import parameters_of

    if out.suffix not in FORMATS:
        raise typer.BadParameter(f"--out {out}: its name must end in one of {', '.join(FORMATS)}")
    FORMATS[out.suffix].kind.check(out)
    found = given.model(model, weights, normalize, device)
    x, _ = given.images(data, None, resize, usual="train").batches(2)[0]
    forged = given.forged(found, stats, ratio, kind, where, statistic, include, exclude, x, graph)
    batch = found.inputs(x.to(device_of(forged)))
    FORMATS[out.suffix].write(forged, batch, out)
    sites = list(parameters_of(forged))
    text = f"{out}: {forged_fx.describe(forged).summary()}, kind {kind}"
    output.show({"out": str(out), "sites": sites}, text, json)
