"""Optional dependencies, imported when first used."""

from importlib import import_module
from types import ModuleType


def need(name: str) -> ModuleType:
    """The module `name`, or an ImportError that says how to get it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # it is there, and lacks something of its own
        raise ImportError(f"forged_fx.evaluate needs {package}: pip install forged_fx[eval]") from error
