"""In half precision, how many elements a compiled threshold decides differently from an eager one.

    python benchmarks/low_precision.py

Inductor keeps a value in float32 between the operations of one kernel, so a threshold that rides on a producer compares
the value before it is rounded; eager code rounds after every operation. `emulate_precision_casts=True`, an option of
Inductor's that backend="forged" passes on, rounds as eager code does. Counted: elements that are zero on one side only,
of a million inputs under 32 thresholds.
"""

import argparse

import torch
import torch.nn.functional as F

import forged_fx.ops  # noqa: F401 (defines the op)

N = 1024
THRESHOLDS = torch.linspace(0.01, 0.1, 32)

PRODUCERS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "bias, relu": lambda x: (x + x[:1]).relu(),
    "layer norm": lambda x: F.layer_norm(x, x.shape[-1:]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    x = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    n = N * N * len(THRESHOLDS)
    print(f"torch {torch.__version__}, of {n:,} decisions; inputs from a normal distribution, thresholds 0.01 to 0.1")
    print(f"{'producer':12} {'dtype':8}  {'default':>8}  {'emulate_precision_casts':>23}")
    for name, producer in PRODUCERS.items():
        for dtype in (torch.bfloat16, torch.float16):
            counts = [differing(producer, x.to(dtype), emulate) for emulate in (False, True)]
            print(f"{name:12} {str(dtype)[6:]:8}  {counts[0]:8}  {counts[1]:23}", flush=True)


def differing(producer, x: torch.Tensor, emulate: bool) -> int:
    def f(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.ops.forged_fx.threshold(producer(x), t)

    torch._dynamo.reset()
    fast = torch.compile(f, backend="forged", options={"emulate_precision_casts": emulate})
    with torch.no_grad():
        return sum(int(((f(x, t) == 0) != (fast(x, t) == 0)).sum()) for t in THRESHOLDS)


if __name__ == "__main__":
    main()
