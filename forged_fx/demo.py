"""The main job from end to end, on an embedded default: `python -m forged_fx.demo`.

Trains a small CNN against attacks on real handwritten digits, forges it, compiles it, and finds out whether that made
it any more robust. Writes into the folder `--out`:

    report.html            the page to read
    result.json            every figure of the evaluation; beside it examples.safetensors, the adversarial images, and
                           timing.json, how long it took
    sites.json, speeds.json, sparsity.json, lipschitz.json    what else `forged-fx report` shows
    stats.safetensors      what calibration measured
    model.safetensors      the trained model's weights
"""

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import forged_fx
from forged_fx import digits, report, throughput, torch_internals
from forged_fx.evaluate.record import vacant
from forged_fx.files import DEMO, DEMO_KEY, FIGURES, PAGE, STATISTICS, whole
from forged_fx.report.run import LIPSCHITZ, SITES, SPARSITY, SPEEDS, save_sites, save_speeds

RATIO = 2**-7
CHANGED = 20  # images at which small changes are made
COMMAND = "python -m forged_fx.demo"
PAGE_NAME, WEIGHTS_NAME = "report.html", "model.safetensors"


class Steps:
    """Says which step runs and how long it took."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    @contextlib.contextmanager
    def __call__(self, what: str, about: int) -> Iterator[None]:
        """about: how many seconds it takes on two cores, more or less."""
        self.done += 1
        began = time.perf_counter()
        print(f"[{self.done}/{self.total}] {what} (about {about} s)", flush=True)
        yield
        print(f"      {time.perf_counter() - began:.1f} s", flush=True)


def run(
    out: Path,
    seed: int = 0,
    n: int = digits.TEST,
    *,
    epochs: int = 12,
    attacks: str | list[str] = "standard",
    rounds: int = 15,
) -> report.Run:
    """Run it all, print what was found, the least flattering first, and write the folder `out`.

    seed: of the training and of the attacks. n: how many test images are attacked, at most 200. epochs, attacks and
    rounds: of the training, `evaluate` and `throughput.compare`; smaller ones make it quick and mean less.
    """
    began, step, ratio = time.perf_counter(), Steps(8), f"1/{1 / RATIO:.0f}"
    _only_a_demos(out)
    out.mkdir(parents=True, exist_ok=True)
    with digits.one_thread():
        with step(f"train a CNN on attacked digits, seed {seed}", 10):
            model, x_train, _, x, y = digits.train_digits(seed, epochs)
            x, y = x[:n], y[:n]
            save_file(model.state_dict(), out / WEIGHTS_NAME, {DEMO_KEY: f"seed {seed}, {epochs} epochs"})
        with step(f"calibrate on the {len(x_train)} training images", 1):
            stats = forged_fx.calibrate(model, x_train.split(256))
            stats.save(out / "stats.safetensors")
        with step(f"transform at ratio {ratio}", 1):
            forged = forged_fx.transform(model, stats, ratio=RATIO)
            sites = forged_fx.describe(forged)
        with step('compile with backend="forged", and compare with eager', 20):
            agreement, modes = check_compiled(forged, x)
        with step("time plain and forged in turn", 30):
            speeds = throughput.compare(model, forged, x, rounds=rounds, modes=modes)
        with step(f"attack {n} test images, plain and forged, Linf {digits.EPS}", 60):
            result = forged_fx.evaluate(forged, base=model, x=x, y=y, eps=digits.EPS, attacks=attacks, seed=seed)
            result.save(out, overwrite=True)
        with step(f"count zeros, and see what small changes do to {min(n, CHANGED)} images", 4):
            zeroed = forged_fx.sparsity(forged, [x])
            reactions = forged_fx.lipschitz(model, forged, x[:CHANGED], eps=digits.EPS)
        with step(f"write {out / PAGE_NAME}", 3):
            found = report.Run(
                title="forged_fx: scikit-learn's handwritten digits",
                about=f"model: a small CNN trained against attacks, forged at ratio {ratio}; base: as trained",
                result=result,
                sites=sites,
                zeros={name: site.share_zero for name, site in stats.sites.items()},
                speeds=speeds,
                timed=sites.forging,
                sparsity=zeroed,
                lipschitz=reactions,
                notes=[agreement],
                facts={"command": f"{COMMAND} --out {shlex.quote(str(out))} --seed {seed} -n {n}", "threads": "1"},
            )
            save_sites(out, sites, stats)
            save_speeds(out, speeds, sites.forging)
            zeroed.save(out / SPARSITY)
            reactions.save(out / LIPSCHITZ)
            with whole(out / PAGE_NAME, PAGE) as part:
                part.write_text(report.page(found), encoding="utf-8")
    print(f"\n{result}\n{agreement}\n\n{throughput.text(speeds)}\n{sites}\n")
    print(f"{time.perf_counter() - began:.0f} s in all. The page to read: {out / PAGE_NAME}")
    return found


def _only_a_demos(folder: Path) -> None:
    """FileExistsError if the folder holds a file under a name that a demo writes, and no demo wrote it."""
    PAGE.check(folder / PAGE_NAME)
    DEMO.check(folder / WEIGHTS_NAME)
    STATISTICS.check(folder / "stats.safetensors")
    for name in (SITES, SPEEDS, SPARSITY, LIPSCHITZ):
        FIGURES.check(folder / name)
    if not (folder / WEIGHTS_NAME).exists():
        vacant(folder)


def check_compiled(forged: nn.Module, x: Tensor) -> tuple[str, list[str]]:
    """What `backend="forged"` computes beside eager, in a sentence; and the modes in which models can be timed here."""
    fast = torch.compile(forged, backend="forged")
    try:
        with torch.no_grad():
            eager, compiled = forged(x), fast(x)
    except torch_internals.compiler_error() as error:
        reason = str(error).partition("\n")[0]
        return f"Not compiled: {reason}. On a CPU this needs g++ or clang++; install one and run again.", ["eager"]
    apart = float((eager - compiled).abs().max())
    flips = int((eager.max(1)[1] != compiled.max(1)[1]).sum())
    sentence = f"Compiled and eager: logits differ by at most {apart:.2g}, predictions on {flips} of {len(x)} images."
    return sentence, list(throughput.MODES)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training and attacks (default: %(default)s)")
    parser.add_argument("-n", type=int, default=digits.TEST, help="test images, 1 to 200 (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 1 <= args.n <= digits.TEST:
        parser.error(f"-n {args.n}: there are {digits.TEST} test images")
    try:
        run(args.out, args.seed, args.n)
    except (ImportError, OSError) as error:  # an extra that is not installed; a folder that cannot be written
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
