"""What sweep, search and judgement of one configuration say about trained models; see docs/findings-on-real-models.md.

    python benchmarks/real_models.py sweep digits --kinds hard clamp --folder runs/digits-sweep
    python benchmarks/real_models.py search zoo:mnist_cnn_a_adv -n 300 --confirm 200 --folder runs/mnist-search
    python benchmarks/real_models.py judge zoo:mnist_cnn_a_adv "clamp 0.7 at 1.0" -n 200
    python benchmarks/real_models.py behind zoo:mnist_cnn_a_adv "clamp 0.7 at 1.0" -n 200

A network is the demo's, "digits", or one of the folder FORGED_FX_ASSETS, zoo:NAME; one thread. Calibrated on all the
training images at hand. A search sees test images and is confirmed on others. Of CIFAR-10 those are the uncompressed
300; their JPEG copies, told by the distance, are left out of what the search sees.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from evaluate_cost import images
from models import load
from torch import Tensor, nn

import forged_fx
from forged_fx import digits
from forged_fx.configuration import Configuration
from forged_fx.evaluate.attacks import PRESETS

# adaptive without AutoAttack's two slow attacks: for trying to break a gain, which is all that it can do
PRESETS["gradients"] = replace(PRESETS["adaptive"], true=("apgd-ce", "apgd-t"))

TWINS = 15 / 255  # root mean square: between a raw image and its JPEG copy 5 to 8 grey levels, between others 20 to 77

Images = tuple[Tensor, Tensor]


def subject(name: str) -> tuple[nn.Module, Tensor, Images, Images, float]:
    """Base, calibration inputs, test images to search on, others to confirm on, eps (Linf)."""
    if name == "digits":
        base, x_train, _, x, y = digits.train_digits(0)
        half = len(x) // 2
        return base, x_train, (x[:half], y[:half]), (x[half:], y[half:]), digits.EPS
    base, _ = load(name)
    folder, rest = Path(os.environ["FORGED_FX_ASSETS"]), name.partition(":")[2]
    eps = json.loads((folder / "models" / rest / "config.json").read_text())["eps"]

    def of(file: str) -> Images:
        return images(folder / "data" / f"{file}.npz", 10_000)

    if rest.startswith("mnist"):
        x, y = of("mnist_test")
        return base, of("mnist_train")[0], (x[1000:], y[1000:]), (x[:1000], y[:1000]), eps
    (x, y), raw = of("cifar10jpeg_test"), of("cifar10raw_300")
    apart = torch.cdist(x.flatten(1), raw[0].flatten(1)).amin(1) / x[0].numel() ** 0.5
    return base, of("cifar10jpeg_train")[0], (x[apart > TWINS], y[apart > TWINS]), raw, eps


def configuration(text: str, sites: list[str]) -> Configuration:
    """From "clamp 0.7 at 1.0; hard 1/64 at 1.2, 1.5"; "at inner" is all sites but the first and the last."""
    places = {}
    for part in text.split(";"):
        how, _, where = part.partition(" at ")
        kind, *ratio = how.split()
        ends = tuple(float(a) / float(b or 1) for a, _, b in (end.partition("/") for end in ratio if end != "to"))
        for site in sites[1:-1] if where.strip() == "inner" else map(str.strip, where.split(",")):
            places[site] = (site, kind, ends if len(ends) > 1 else ends[0])
    return Configuration(tuple(places[site] for site in sites if site in places))


def judge(args: argparse.Namespace, base: nn.Module, stats: forged_fx.Stats, kept: Images, eps: float) -> Any:
    chosen = configuration(args.configuration, list(stats.sites))
    x, y = (part[args.skip : args.skip + args.n] for part in kept)
    attacks = args.attacks.split("+") if "+" in args.attacks else args.attacks
    return forged_fx.evaluate(
        chosen.forge(base, stats), base, x=x, y=y, eps=eps, attacks=attacks, seed=args.seed, folder=args.folder
    )


def behind(args: argparse.Namespace, base: nn.Module, stats: forged_fx.Stats, kept: Images, eps: float) -> str:
    """An attack on a clamp of the first site in which nothing can be masked: it works on what comes out of the clamp.

    A clamp is monotone, so what an attacker's box of pixels becomes behind it is a smaller box, pixel by pixel, and all
    of it can be reached. PGD with momentum in that box attacks the base itself, whose gradient is what it is.
    """
    x, y = (part[args.skip : args.skip + args.n] for part in kept)
    ((site, kind, ratio),) = configuration(args.configuration, list(stats.sites)).places
    forged = Configuration(((site, kind, ratio),)).forge(base, stats)
    mean, std, limit = base[0].mean, base[0].std, ratio * stats.sites[site].c_max
    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    inner_low, inner_high = (((end - mean) / std).clamp(-limit, limit) * std + mean for end in (low, high))
    torch.manual_seed(args.seed)
    right = {"forged": forged(x).argmax(1) == y, "base": base(x).argmax(1) == y}
    for begun in range(args.restarts):
        for name, (floor, ceiling) in {"forged": (inner_low, inner_high), "base": (low, high)}.items():
            adv, momentum = floor + torch.rand_like(x) * (ceiling - floor), torch.zeros_like(x)
            for i in range(args.steps):
                adv.requires_grad_()
                logits = base(adv)
                own = logits.gather(1, y[:, None]).squeeze(1)
                other = logits.scatter(1, y[:, None], -torch.inf).amax(1)
                loss = (
                    (other - own).sum() if begun % 2 else torch.nn.functional.cross_entropy(logits, y, reduction="sum")
                )
                (grad,) = torch.autograd.grad(loss, adv)
                momentum = 0.75 * momentum + grad / grad.flatten(1).norm(1, dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
                step = 2 * eps * (1 - i / args.steps)
                adv = (adv.detach() + step * momentum.sign()).clamp(floor, ceiling)
                shown = adv.clamp(low, high)  # pixels that the attacker may choose, and that come to the same
                with torch.no_grad():
                    right[name] &= (forged if name == "forged" else base)(shown).argmax(1) == y
        print(f"start {begun + 1}: " + ", ".join(f"{name} {int(r.sum())}" for name, r in right.items()), flush=True)
    return f"right of {len(x)} after {args.restarts} starts of {args.steps} steps behind the clamp (base: as ever)"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("sweep", "search", "judge", "behind"):
        command = commands.add_parser(name)
        command.add_argument("model", help="digits, or zoo:NAME")
        if name == "behind":
            command.add_argument("--restarts", type=int, default=10)
            command.add_argument("--steps", type=int, default=100)
        if name in ("judge", "behind"):
            command.add_argument("configuration", help='such as "clamp 0.7 at 1.0; hard 1/64 at inner"')
            command.add_argument("--skip", type=int, default=0, help="so many of the inputs, which a search has seen")
        command.add_argument(
            "-n", type=int, default=200, help="inputs; those that a search sees (default: %(default)s)"
        )
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--folder", type=Path, help="record the run here; the same command goes on with it")
        usual = {"sweep": "standard", "search": "adaptive", "judge": "adaptive", "behind": ""}[name]
        command.add_argument("--attacks", default=usual, help="default: %(default)s")
        if name in ("sweep", "search"):
            command.add_argument("--kinds", nargs="+", default=["hard", "clamp"] if name == "sweep" else None)
        if name == "search":
            command.add_argument("--confirm", type=int, default=200, help="inputs kept for the finalists")
            command.add_argument("--budget", type=int, default=150, help="configurations tried (default: %(default)s)")
            command.add_argument("--finalists", type=int, default=2)
            command.add_argument("--max-natural-loss", type=float, default=0.01)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.process_time()
    base, x_train, seen, kept, eps = subject(args.model)
    stats = forged_fx.calibrate(base, x_train.split(250))
    if args.command in ("judge", "behind"):
        print({"judge": judge, "behind": behind}[args.command](args, base, stats, kept, eps))
    elif args.command == "sweep":
        ratios = {
            kind: (0.9, 0.8, 0.7, 0.5) if kind == "clamp" else (2**-8, 2**-7, 2**-6, 2**-5) for kind in args.kinds
        }
        x, y = (part[: args.n] for part in kept)
        options = {"kinds": args.kinds, "attacks": args.attacks, "seed": args.seed, "folder": args.folder}
        print(forged_fx.sweep(base, stats, x, y, eps=eps, ratios=ratios, **options))
    else:
        options = {"kinds": args.kinds} if args.kinds else {}
        found = forged_fx.search(
            base, stats, *(part[: args.n] for part in seen), eps=eps, budget=args.budget, finalists=args.finalists,
            confirm=tuple(part[: args.confirm] for part in kept), max_natural_loss=args.max_natural_loss,
            attacks=args.attacks, seed=args.seed, folder=args.folder, **options,
        )  # fmt: skip
        print(found)
    print(f"{time.process_time() - began:.0f} s of CPU time, one thread, torch {torch.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
