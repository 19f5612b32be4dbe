"""Optional dependencies, imported when first used."""

from importlib import import_module
from typing import Any


def need(module: str, extra: str = "eval") -> Any:
    """The module, or an ImportError that says how to get it. extra: the one of this package that brings it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f'this needs {package} ({error}): in a checkout of forged_fx, pip install ".[{extra}]"'
        ) from error
