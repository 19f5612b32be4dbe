"""What a forward pass keeps for its backward, plain and forged: MiB, and the forged model's as a multiple.

    python benchmarks/training_memory.py torchvision:resnet18 timm:vit_small_patch16_224 timm:convnext_tiny

Learning: train mode, gradients of the weights. Attacked: eval mode, frozen weights, the input's gradient, as an attack
asks for it. Counted is each tensor that autograd saves, once, whoever shares it; weights and their copies are left out.
Nothing is timed, so the figures are the same on every machine.
"""

import argparse
import sys

import torch
from models import load, model_name
from overhead import MODELS
from torch import Tensor, nn

import forged_fx


def kept(model: nn.Module, run: nn.Module, x: Tensor) -> float:
    """MiB that are kept at the end of a forward pass of `run`, which is `model` or its compiled form."""
    weights = {tuple(p.shape) for p in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter) and tuple(value.shape) not in weights:
            found[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        run(x)
    return sum(storage.nbytes() for storage in found.values()) / 2**20


def measure(name: str, batch: int, compiled: bool) -> None:
    model, shape = load(name)
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0))
    forged = forged_fx.transform(model, forged_fx.calibrate(model, [x]), ratio=2**-6)
    backends = {"eager": None, **({"compiled": ("inductor", "forged")} if compiled else {})}
    for what, learning in (("learning", True), ("attacked", False)):
        for one in (model, forged):
            one.train(learning).requires_grad_(learning)
        for mode, backend in backends.items():
            pair = []
            for i, one in enumerate((model, forged)):
                torch._dynamo.reset()
                run = one if backend is None else torch.compile(one, backend=backend[i])
                pair.append(kept(one, run, x.clone().requires_grad_(not learning)))
            plain, ours = pair
            print(f"{name:36} {what:9} {mode:9} {plain:9.1f} {ours:9.1f} {ours / plain:7.3f}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=model_name, metavar="MODEL", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, float32, batch {args.batch}")
    print(f"{'model':36} {'':9} {'':9} {'plain':>9} {'forged':>9} {'':>7}")
    for name in args.models:
        measure(name, args.batch, args.compile)
    return 0


if __name__ == "__main__":
    sys.exit(main())
