"""forged-fx calibrate"""

from pathlib import Path
from typing import Annotated

import typer

from forged_fx.cli import options

EXAMPLE = (
    "forged-fx calibrate forged_fx.digits:cnn --weights demo/model.safetensors --data digits --out stats.safetensors"
)


def run(
    model: options.Model,
    data: options.Data,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the statistics go.")] = Path("stats.safetensors"),
    weights: options.Weights = None,
    normalize: options.Normalize = None,
    split: options.Split = None,
    resize: options.Resize = None,
    limit: options.Limit = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a batch.")] = 128,
    where: Annotated[
        str, typer.Option(metavar="WHERE", help="linear+conv; activations: the inputs of activations besides.")
    ] = options.WHERE,
    channels: Annotated[bool, typer.Option(help="Each channel's mean and deviation too, for kind mean.")] = False,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Scan images once, without gradients, and record how large every layer's inputs get.

    Takes the training images where the data has splits. Interrupted, the same command goes on where it was. Under
    torchrun the batches are shared out, and the file is the same.
    """
    import forged_fx
    from forged_fx import checkpoint
    from forged_fx.cli import given, output
    from forged_fx.files import STATISTICS
    from forged_fx.processes import joined
    from forged_fx.sources import Inputs
    from forged_fx.transform import ACTIVATIONS, LAYERS

    if where not in (LAYERS, ACTIVATIONS):
        raise typer.BadParameter(f"--where {where}: choose {LAYERS} or {ACTIVATIONS}; transform's names single sites")
    STATISTICS.check(out)  # now, and not after an hour
    chosen = given.images(data, split, resize, "train", limit)
    found = given.model(model, weights, normalize, device)
    seen = Inputs(given.share(chosen.batches(batch, limit)), found.inputs)
    with joined(None, "forged-fx calibrate") as processes:
        share = f".{processes.rank}of{processes.size}" if processes.size > 1 else ""
        kept = out.with_name(f"{out.name}.unfinished{share}")
        with output.resumable(kept):
            stats = forged_fx.calibrate(found.module, seen, where=where, channels=channels, checkpoint=kept)
        processes.first(lambda: stats.save(out))
        checkpoint.forget(kept)
    sites = [name for name, site in stats.sites.items() if site.left_out is None]
    left_out = {name: site.left_out for name, site in stats.sites.items() if site.left_out is not None}
    n = len(chosen.taken(limit))
    document = {"out": str(out), "images": n, "batches": stats.batches, "sites": sites, "left_out": left_out}
    beside = f", {len(left_out)} left out (forged-fx describe says why)" if left_out else ""
    output.show(document, f"{out}: {len(sites)} sites from {n} images{beside}", json)
