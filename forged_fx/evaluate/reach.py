"""Whether anything that is run sees through what was made of the base, or the attacks were blind and nobody told.

BPDA and the smooth surrogates are modes (`bpda.py`): code that was traced to TorchScript, decomposed, compiled with its
thresholds, or that runs in threads of its own, does not ask them. Then their rows change no gradient and are left out,
as they are for a model without thresholds. By names and operators those two can be told apart; where neither is left,
by the function: along a short segment a gradient adds up to what the logits change, but for jumps that it knows nothing
of. (Limits and soft thresholds do not jump: without a name they pass for what a plain model does.)
"""

from contextlib import suppress
from math import inf
from typing import Any

import torch
from torch import Tensor, fx, nn

from forged_fx.checked import in_a_line
from forged_fx.evaluate import blocks as unit
from forged_fx.evaluate.blocks import Outcome
from forged_fx.evaluate.compiled import ROUNDING
from forged_fx.evaluate.findings import Measured
from forged_fx.evaluate.gradients import Logits, centred, combined, gradient
from forged_fx.evaluate.harness import Subject, predict
from forged_fx.evaluate.probes import PROBED
from forged_fx.models import copied
from forged_fx.torch_internals import TorchDispatchMode

PARTS = 16  # of the segment, each with the gradient at its middle
JUMPS = 0.05  # share that may not add up: at most 0.024 on plain networks, 0.07 to 1 on most forged ones (the docs)


def held(model: nn.Module) -> int:
    """How many thresholds the model is seen to hold: by the names of buffers, those in force; where nothing has such a
    name, by the operators of its graphs."""
    from forged_fx.ops import THRESHOLD_OPS  # late: evaluate serves models of any make
    from forged_fx.thresholds import PREFIX

    leaves = [(name.rpartition(".")[2], buffer) for name, buffer in model.named_buffers()]
    if ends := [end for leaf, end in leaves if leaf.startswith(PREFIX) and not leaf.startswith(f"{PREFIX}mean")]:
        return sum(bool((end.isfinite() & (end != 0)).any()) for end in ends)
    calls = 0
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            with suppress(AttributeError, RuntimeError):  # a part whose forward nobody called has no graph
                calls += str(module.graph).count("forged_fx::")
        elif isinstance(module, fx.GraphModule):
            calls += sum(node.target in THRESHOLD_OPS for node in module.graph.nodes if node.op == "call_function")
    return calls


def apart(side: Subject, other: Subject, *logits: Tensor) -> float:
    """How far the two's logits lie apart, as a share of the largest of the one's, `centred`: unattacked, where they are
    given, and if they are alike there (`ROUNDING`), on what attacks found, and where those may go."""
    largest = float(centred(logits[0]).abs().max())
    far = float((logits[0] - logits[1]).abs().max())
    if far > ROUNDING * largest:
        return far / largest if largest else inf
    for x in (*(one.examples[one.broken_by >= 0] for one in (side, other)), *_moved(other)):
        for part in x.split(side.batch_size) if len(x) else ():
            answers = [Logits(one.model, one.batch_size)(part.to(one.device)).cpu() for one in (side, other)]
            equal = (answers[0] == answers[1]) | (answers[0].isnan() & answers[1].isnan())
            difference = (answers[0] - answers[1]).abs().nan_to_num(torch.inf).masked_fill(equal, 0.0)
            far = max(far, float(difference.max()))
    return far / largest if largest else far


def _moved(side: Subject) -> list[Tensor]:
    """The inputs, a step of the ball up and down the side's gradient."""
    moved: list[Tensor] = []
    for part in side.x.split(min(side.batch_size, unit.BLOCK)):  # a graph holds no more inputs than an attack's does
        uphill = gradient(Logits(side.attacked, side.batch_size), part.to(side.device))
        moved += side.threat.steps(part, uphill.to(part.device))
    return moved


def unreached(side: Subject, own: bool) -> bool:
    """Whether no gradient changed that sees through thresholds. own: BPDA is the library's own.

    The smooth surrogates say it, where they were asked: they know no kind of forging that they leave as it is, and do
    not reach into all that the straight-through gradient reaches into.
    """
    smooth = [changed for name, changed in side.changes.items() if name != "BPDA"]
    through = side.changes.get("BPDA", False)
    return not any(smooth) if own and smooth else not through


def thresholds(side: Subject, own: bool, alike: bool) -> Measured:
    """How many thresholds the model holds that no gradient sees through."""
    if not side.changes:
        return "no attack that follows a gradient was run"
    if alike:
        return "the model is its base, to rounding"
    count = held(side.model) or int(own and any(side.changes.values()))
    return (count if unreached(side, own) else 0), 0


def jumps(side: Subject, base: Subject | None, alike: bool) -> Measured:
    """Which share of what the logits change no gradient adds up to: the median of the first inputs. Twice the base's
    share, in the model's dtype, is what its arithmetic (bfloat16, say) explains."""
    if base is None:
        return "there is no base"
    if alike:
        return "the model is its base, to rounding"
    if any(side.changes.values()):
        return "BPDA sees through the model"
    share = _missing(side, side.attacked)
    if share <= JUMPS:
        return share, JUMPS
    dtype, plain = _coarse(side), base.attacked
    if dtype is not None and _coarse(base) is None:
        try:
            plain = _Cast(base.attacked, dtype)
            predict(plain, base.x[:1], 1)
        except Exception as error:
            return f"its arithmetic is coarser than its base's, which does not run in {dtype} ({in_a_line(error)})"
    return share, max(JUMPS, 2 * _missing(base, plain))


def base_jumps(base: Subject) -> bool:
    """Whether the base's gradient leaves out more of what its logits change than the bound allows. What the rounding of
    half precision leaves out, its copy in float32 does not; one that does not run in that is not accused."""
    if any(base.changes.values()) or _missing(base, base.attacked) <= JUMPS:
        return False
    if _coarse(base) is None:
        return True
    fine = _Cast(base.attacked, torch.float32)
    try:
        still = _coarse(base, fine)
    except Exception:
        return False
    return still is None and _missing(base, fine) > JUMPS


def _coarse(side: Subject, model: nn.Module | None = None) -> torch.dtype | None:
    """The dtype of half precision that the side's model, or this copy of it, computes its products in, most of what
    they give, if there is one: its parameters may be float32 all the same, as under autocast."""
    with _Products() as seen, torch.no_grad():
        predict(model or side.attacked, side.x[:1], 1)
    dtype = max(seen.sizes, key=seen.sizes.__getitem__, default=None)
    return dtype if dtype is not None and dtype.is_floating_point and torch.finfo(dtype).bits < 32 else None


_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "linear"}


class _Products(TorchDispatchMode):
    """Notes how many elements products give in each dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and function.overloadpacket.__name__ in _PRODUCTS:
            self.sizes[result.dtype] = self.sizes.get(result.dtype, 0) + result.numel()
        return result


class _Cast(nn.Module):
    """A copy of a model in another dtype."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        twin = copied(model, own=dict(model.named_modules()))
        self.model, self.dtype = twin.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype)).float()


def _missing(side: Subject, model: nn.Module) -> float:
    """model: the side's, or its copy in another dtype. Asked once."""
    name = f"{side.name} jumps" + (f" in {model.dtype}" if isinstance(model, _Cast) else "")
    if name in side.missing:
        return side.missing[name]
    some = torch.arange(min(PROBED, len(side.x)))

    def ask(indices: Tensor) -> Outcome:
        x, _ = side.inputs(indices)
        logits = Logits(model, side.batch_size)
        way = side.threat.step(x, (torch.rand(x.shape) - 0.5).to(x.device)) - x
        with torch.no_grad():
            change = combined(logits(x + way)) - combined(logits(x))
        parts = [gradient(logits, x + (k + 0.5) / PARTS * way) * way / PARTS for k in range(PARTS)]
        sums = torch.stack([part.flatten(1).sum(1) for part in parts])
        size = (change.abs() + sums.abs().sum(0)).clamp_min(1e-30)
        return {"missing": ((change - sums.sum(0)).abs() / size).median().nan_to_num(1.0).double().cpu()}

    fields = {"missing": (torch.float64, 0)}
    side.missing[name] = next(iter(side.blocks.run(name, some, ask, fields)))[1]["missing"].item()
    return side.missing[name]
