"""A module's own calls, forged where Dynamo records them: each is told by the weight that it is given.

In eager mode they are told by their number, and the stack says whose they are (`regions.py`); Dynamo sees no stack. A
weight that one forged call met in calibration, and that one call is given now, says the same. Where it does not (a
weight that is computed, or given to two calls, or to none on this path) the module runs uncompiled.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from forged_fx import torch_internals
from forged_fx.sites import CALLS, OPENED, get, replace

if TYPE_CHECKING:
    from forged_fx.regions import Forge, Plan

# per weight, its name in the module, and what to do with the call that is given it
ByWeight = tuple[tuple[str, tuple["Forge", ...]], ...]


def by_weight(plan: "Plan") -> ByWeight | None:
    """None where the calls of a plan cannot be told so."""
    if not plan.once or plan.told is None or torch_internals.VERSION < (2, 14):  # (older ones were not tried)
        return None
    told = plan.told
    weights = [told.weights.get(k, set()) for k in plan.operands]
    names = [name for of_call in weights for name in of_call]
    if len(names) != len(weights) or len({*names}) != len(names) or not all(weights):
        return None
    parts = {part for k in plan.operands for _, part in told.parts.get(k, ())}
    others = told.within.union(*(of_call for k, of_call in told.weights.items() if k not in plan.operands))
    if parts - {""} or not others.isdisjoint(names):
        return None
    return tuple(zip(names, map(tuple, plan.operands.values()), strict=True))


class TracedCalls(TorchFunctionMode):
    """Thresholds the operands of the calls that are given the weights of `table`, while Dynamo traces a forward."""

    def __init__(self, region: torch.nn.Module, table: ByWeight) -> None:
        super().__init__()
        self.region = region
        self.table = table
        self.met: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in OPENED:
            with self:
                return OPENED[function](*args, **kwargs)
        call = CALLS.get(function)
        if call is None:
            return function(*args, **kwargs)
        for name, forges in self.table:
            weight = self.region.get_parameter(name)
            if any(value is weight for value in (*args, *kwargs.values())):
                if name in self.met:
                    _give_up(self.region)
                self.met.append(name)
                for forge in forges:
                    if call.kind != forge.kind or (x := get(args, kwargs, forge.key)) is weight:
                        _give_up(self.region)
                    args, kwargs = replace(args, kwargs, forge.key, forge(self.region, x))
        return function(*args, **kwargs)

    def check(self) -> None:
        """Each call must have been met once."""
        if len(self.met) != len(self.table):
            _give_up(self.region)


@torch.compiler.disable
def _give_up(region: torch.nn.Module) -> None:
    """Dynamo does not come this far: it gives up the forward that calls this, which then runs uncompiled."""
    raise RuntimeError(f"the calls of {type(region).__name__} that have a threshold are not told by their weights")
