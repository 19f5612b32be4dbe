"""forged_fx hardens a trained PyTorch model after the fact, and tells the truth about how much it helped.

Every public name is imported when it is first used, so that `import forged_fx` costs next to nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

# public name -> the module that defines it
_PUBLIC = {
    "Stats": "stats",
    "calibrate": "calibrate",
    "transform": "transform",
    "set_ratio": "transform",
    "straight_through": "ops",
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
