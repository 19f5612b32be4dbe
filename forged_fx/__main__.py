"""`python -m forged_fx`: the terminal, see `forged_fx.cli`."""

import sys

try:
    from forged_fx.cli import main
except ModuleNotFoundError as error:
    if error.name not in ("typer", "rich"):
        raise
    sys.exit(f"forged-fx: the terminal needs {error.name}: pip install forged_fx[cli]")

if __name__ == "__main__":
    sys.exit(main())
