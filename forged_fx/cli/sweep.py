"""forged-fx sweep"""

from typing import Annotated

import typer

from forged_fx.cli import options

EXAMPLE = (
    "forged-fx sweep forged_fx.digits:cnn --weights demo/model.safetensors --data digits --eps 0.15 --limit 8 "
    "--ratios 2**-7,2**-5 --attacks apgd-ce --rounds 0"
)


def run(
    model: options.Model,
    data: options.Data,
    eps: options.Eps,
    norm: Annotated[str, typer.Option(help="Linf, L2 or L1.")] = "Linf",
    ratios: Annotated[
        str, typer.Option(help="Of every kind, or by kind: hard=2**-7,2**-6,clamp=0.7; for kind band LOW:HIGH.")
    ] = "2**-8,2**-7,2**-6,2**-5",
    kinds: Annotated[
        str | None,
        typer.Option(
            help="hard, one_sided, shifted, soft, clamp, band, mean. Without it: those that --ratios is by, else hard."
        ),
    ] = None,
    calibrate: options.Calibrate = None,
    calibrate_limit: options.Limit = None,
    attacks: Annotated[str, typer.Option(help="As for evaluate.")] = "standard",
    seed: Annotated[int, typer.Option(help="Of all attacks.")] = 0,
    rounds: Annotated[int, typer.Option(min=0, help="Of timing; 0: none.")] = 15,
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
) -> None:
    """Forge a model at several ratios and kinds, and judge all of them under one pool of adversarial examples.

    Calibrates the model first. Under torchrun it is shared by all processes. docs/sweep.md says how to read it.
    """
    import forged_fx
    from forged_fx.cli import given, output

    found = given.model(model, weights, normalize, device)
    x, y = given.images(data, split, resize, "test", limit).tensors(limit)
    seen = given.seen(calibrate or data, resize, batch, calibrate_limit)
    chosen = None if kinds is None else options.names(kinds)
    with output.resumable(folder):
        result = forged_fx.sweep(
            found.classifier(),
            seen,
            x,
            y,
            eps=options.number(eps, "eps"),
            ratios=options.ratios(ratios),
            kinds=chosen,
            norm=norm,
            attacks=options.attacks(attacks),
            seed=seed,
            batch_size=batch,
            rounds=rounds,
            include=include or None,
            exclude=exclude or None,
            folder=folder,
        )
    output.show({"sentence": result.sentence, "rows": result.records()}, str(result), json)
