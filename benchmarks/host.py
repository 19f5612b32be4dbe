"""What a forged model in eager mode makes Python do on a GPU, measured without one: a table.

    python benchmarks/host.py

A GPU waits where Python takes longer to ask for the next kernel than the last one runs: in eager mode at small batches,
and at large ones where kernels are many and short. So a fused call must not take longer than what it stands for.

Forged models take a GPU's way here on a CPU, all but its last step: instead of a kernel nothing runs, so what comes out
means nothing. The networks are those of README, narrow, so that what PyTorch computes beside it takes next to no time.
What is not in it: Triton's launcher and CUDA's, a few microseconds for each kernel, of which a fused model has fewer.

plain, graph, unfused, fused: milliseconds of a forward pass, the fastest of the rounds, one thread: the model; the
graph of the forged one without its thresholds, which is faster than nested modules; with them; with fused ones. calls:
those that are fused. per call: microseconds that one takes more than the modules whose place it takes. a threshold:
that one alone takes. Both are beside the graph.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from typing import Any

import torch

import forged_fx
from forged_fx import in_place, ops
from forged_fx.kernels import launch as launching
from forged_fx.throughput import interleave
from forged_fx.transform import forging_of


def timm(name: str, **narrow: Any) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        from timm import create_model

        return create_model(name, pretrained=False, **narrow)

    return make


# name -> the network, and the side of its input
NETS = {
    "convnext_tiny": (timm("convnext_tiny", dims=(16, 16, 16, 16)), 32),
    "vit_small": (timm("vit_small_patch16_224", img_size=32, embed_dim=16, num_heads=2), 32),
    "swin_tiny": (timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=16, num_heads=(1, 1, 1, 1)), 56),
}


class Anything(dict):
    """What kernels/launch.py knows: for each case, machine code that does nothing."""

    launches = 0

    def get(self, key: Any, default: Any = None) -> Any:
        self.launches += 1
        return (lambda *_: None), ()


def without_thresholds(forged: torch.fx.GraphModule) -> torch.fx.GraphModule:
    bare = copy.deepcopy(forged)
    for node in bare.graph.nodes:
        if node.target in ops.THRESHOLD_OPS:
            node.replace_all_uses_with(node.args[0])
            bare.graph.erase_node(node)
    bare.recompile()
    return bare


def take_a_gpus_way() -> Anything:
    """From here on; nothing that is computed afterwards means anything. Returns what counts the launches."""
    torch.cuda.current_device = lambda: None  # type: ignore[assignment,return-value] # a CPU's index
    launching._known = launched = Anything()
    for op in ops.CUDA:
        ops._CPU[op] = ops.CUDA[op]
    in_place._plain = lambda *_: False  # type: ignore[assignment]
    return launched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=list(NETS), metavar="NET", help=", ".join(NETS))
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    if unknown := set(args.nets) - set(NETS):
        parser.error(f"no network {min(unknown)!r}; there are {', '.join(NETS)}")
    torch.set_num_threads(1)
    models = {}
    for name in args.nets:
        make, side = NETS[name]
        model, x = make().eval(), torch.rand(1, 3, side, side)
        model, x = (v.to(memory_format=torch.channels_last) for v in (model, x))
        stats = forged_fx.calibrate(model, [x])
        fused, unfused = (forged_fx.transform(model, stats, 2**-6, fuse=fuse) for fuse in (True, False))
        bare = without_thresholds(unfused)
        models[name] = x, {"plain": model, "graph": bare, "unfused": unfused, "fused": fused}
    launched = take_a_gpus_way()
    heads = "".join(f"{head:>9}" for head in ("plain", "graph", "unfused", "fused", "calls"))
    print(f"{'network':<16}{heads}{'per call':>10}{'a threshold':>13}")
    with torch.no_grad():
        for name, (x, variants) in models.items():
            fusing, sites = forging_of(variants["fused"]).fused, len(forging_of(variants["fused"]).reached)
            for which, expected in (("graph", 0), ("unfused", sites), ("fused", sites)):
                launched.launches = 0
                variants[which](x), variants[which](x)
                if launched.launches != 2 * expected:
                    sys.exit(f"host.py: {name}, {which}: {launched.launches} launches in two passes of {expected}")
            calls = {("", which): lambda m=m, x=x: m(x) for which, m in variants.items()}
            times = [1e3 * seconds.min() for seconds in interleave(calls, args.rounds).values()]
            _, graph, unfused, fused = times
            alone = (unfused - graph) / sites
            per_call = (fused - graph - (sites - fusing) * alone) / fusing
            figures = "".join(f"{ms:>9.3f}" for ms in times)
            print(f"{name:<16}{figures}{fusing:>9}{1e3 * per_call:>10.1f}{1e3 * alone:>13.1f}")


if __name__ == "__main__":
    main()
