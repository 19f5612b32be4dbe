"""forged-fx search"""

from typing import Annotated, Any

import typer

from forged_fx.cli import options

EXAMPLE = (
    "forged-fx search forged_fx.digits:cnn --weights demo/model.safetensors --data digits --eps 0.15 --limit 16 "
    "--kinds clamp --budget 2 --finalists 1 --attacks apgd-ce"
)

FOUND, NOTHING = 0, 3  # exit codes; 3 is also that of "no measurable gain"


def run(
    model: options.Model,
    data: options.Data,
    eps: options.Eps,
    norm: Annotated[str, typer.Option(help="Linf, L2 or L1.")] = "Linf",
    kinds: Annotated[str | None, typer.Option(help="Which may be used. Without it: hard, soft, clamp, band.")] = None,
    max_natural_loss: Annotated[str, typer.Option(help="Natural accuracy that may be lost, a share.")] = "0.01",
    budget: Annotated[int, typer.Option(min=1, help="Configurations that are tried, at most.")] = 200,
    seconds: Annotated[float | None, typer.Option(help="Of trying, at most.")] = None,
    finalists: Annotated[int | None, typer.Option(min=1, help="How many are confirmed, at most.")] = None,
    calibrate: options.Calibrate = None,
    calibrate_limit: options.Limit = None,
    attacks: Annotated[str, typer.Option(help="Of the confirmation, as for evaluate.")] = "adaptive",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    batch: options.BatchSize = 250,
    include: options.Include = None,
    exclude: options.Exclude = None,
    folder: options.Folder = None,
    weights: options.Weights = None,
    normalize: options.Normalize = None,
    split: options.Split = None,
    resize: options.Resize = None,
    limit: options.Limit = None,
    device: options.Device = None,
    json: options.Json = False,
) -> int:
    """Look for kinds, sites and ratios that make a model more robust, and confirm what is found on other images.

    Calibrates the model first; half of the images are kept for the confirmation, and not calibrated on. Exit code 0:
    something beats the base; 3: nothing does. Under torchrun it is shared by all processes. docs/search.md says how to
    read it.
    """
    import torch

    import forged_fx
    from forged_fx.cli import given, output
    from forged_fx.search import split as halves
    from forged_fx.sources import Images

    found = given.model(model, weights, normalize, device).classifier()
    x, y = given.images(data, split, resize, "test", limit).tensors(limit)
    (x, y), kept = halves(x, y, 0.5, seed)
    if (calibrate is None or given.same_source(calibrate, data)) and given.same_images(data, split):
        output.note(f"calibrated on the {len(x)} images of the search: the others are kept for the confirmation")
        images = Images(data, x, y, decode=torch.as_tensor, mixed=False)
        seen = given.share(images.batches(batch, calibrate_limit))
    else:
        seen = given.seen(calibrate or data, resize, batch, calibrate_limit)
    chosen = None if kinds is None else options.names(kinds)
    given_only: dict[str, Any] = {"kinds": chosen, "seconds": seconds, "finalists": finalists}
    with output.resumable(folder):
        result = forged_fx.search(
            found,
            forged_fx.calibrate(found, seen, channels="mean" in (chosen or ())),
            x,
            y,
            eps=options.number(eps, "eps"),
            norm=norm,
            max_natural_loss=options.number(max_natural_loss, "max-natural-loss"),
            budget=budget,
            confirm=kept,
            attacks=options.attacks(attacks),
            seed=seed,
            batch_size=batch,
            include=include or None,
            exclude=exclude or None,
            folder=folder,
            **{name: value for name, value in given_only.items() if value is not None},
        )
    output.show({"sentence": result.sentence, "rows": result.records()}, str(result), json)
    return NOTHING if result.best is None else FOUND
