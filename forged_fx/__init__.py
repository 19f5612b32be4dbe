"""forged_fx hardens a trained PyTorch model after the fact, and tells the truth about how much it helped.

Every public name is imported when it is first used, so that `import forged_fx` costs next to nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers see in place of `__getattr__`
    from forged_fx.bpda import straight_through as straight_through
    from forged_fx.calibrate import calibrate as calibrate
    from forged_fx.cost import cost as cost
    from forged_fx.describe import describe as describe
    from forged_fx.evaluate import compare as compare
    from forged_fx.evaluate import evaluate as evaluate
    from forged_fx.lipschitz import lipschitz as lipschitz
    from forged_fx.ops import decompositions as decompositions
    from forged_fx.search import search as search
    from forged_fx.sparsity import sparsity as sparsity
    from forged_fx.stats import Stats as Stats
    from forged_fx.sweep import sweep as sweep
    from forged_fx.transform import set_ratio as set_ratio
    from forged_fx.transform import transform as transform

# public name -> the module that defines it
_PUBLIC = {
    "Stats": "stats",
    "calibrate": "calibrate",
    "transform": "transform",
    "set_ratio": "transform",
    "straight_through": "bpda",
    "decompositions": "ops",
    "evaluate": "evaluate",
    "compare": "evaluate",
    "describe": "describe",
    "cost": "cost",
    "sparsity": "sparsity",
    "sweep": "sweep",
    "search": "search",
    "lipschitz": "lipschitz",
}

__all__ = [*_PUBLIC, "__version__"]


if not TYPE_CHECKING:  # to a type checker it would mean that every name is there

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'forged_fx' has no attribute {name!r}")
        value = getattr(import_module(f"forged_fx.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """A call and the file that defines it share a name: `forged_fx.calibrate` is the call, whoever imported the
    file first. (Python would put the module there once anything imports `forged_fx.calibrate`.)"""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _PUBLIC:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
