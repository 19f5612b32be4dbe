"""The commands, and what becomes of errors, interruptions and exit codes."""

import functools
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import Any

import typer
from typer.exceptions import TyperException

from forged_fx.cli.output import Interrupted, apart

# in the order in which --help lists them
COMMANDS = (
    *("calibrate", "transform", "describe", "evaluate", "compare"),
    *("sparsity", "lipschitz", "sweep", "search", "bench", "report", "demo"),
)

ERROR, INTERRUPTED = 1, 130
EXIT_NOTE = (
    "Exit codes: 0 done; 1 an error, said in one line; 2 a command line that was not understood; 130 interrupted. "
    "evaluate, compare and search: 0 gain, 3 no measurable gain, 4 loss, 5 masking, 6 cannot say."
)
DEBUG = "FORGED_FX_DEBUG"  # set, errors come with their traceback

app = typer.Typer(
    name="forged-fx",
    help="Harden a trained PyTorch model after the fact, and tell the truth about how much it helped.",
    epilog=EXIT_NOTE,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _whole(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from forged_fx import __version__

        print(__version__)
        raise typer.Exit


def _add(name: str) -> None:
    module = import_module(f"forged_fx.cli.{name}")
    example = module.EXAMPLE.replace("[", r"\[")  # rich would read it as markup

    @functools.wraps(module.run)
    def run(**arguments: Any) -> Any:
        apart(arguments)
        from forged_fx.cli.understood import check  # late: it imports torch, and --help does not

        check(arguments)
        return module.run(**arguments)

    app.command(name, epilog=f"Example: {example}")(run)


for _name in COMMANDS:
    _add(_name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    before, warned = _handle(_as_interruption), warnings.formatwarning
    if not os.environ.get(DEBUG) and _is_main_thread():
        warnings.formatwarning = _warning
    try:
        code = app(args=None if argv is None else list(argv), standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # typer's answer to Ctrl-C
            _say("interrupted")
        return 0 if _is_verdict_of_several(code) else code or 0
    except TyperException as error:  # the command line
        said = error.format_message()
        if said:  # with no_args_is_help the help was printed, and there is nothing to say
            _say(said + _hint(error))
        return error.exit_code
    except Interrupted as error:
        _say(f"interrupted: {error}")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except Exception as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        _say(_line(error))
        return ERROR
    finally:
        _handle(before)
        if _is_main_thread():
            warnings.formatwarning = warned


def _is_verdict_of_several(code: int | None) -> bool:
    """torchrun takes whatever is not 0 for a failure, and ends the other processes."""
    if code is None or not ERROR < code < INTERRUPTED:
        return False
    from forged_fx.processes import place  # late: it imports torch

    return place()[1] > 1


def _line(error: Exception) -> str:
    """An error in one line, with its notes. Those that this library did not raise on purpose come with their name."""
    text = " ".join(str(error).split())
    ours = isinstance(error, ValueError | TypeError | RuntimeError | ImportError | OSError) and text
    notes = " ".join(f"({' '.join(note.split())})" for note in getattr(error, "__notes__", []))
    text = f"{text} {notes}" if notes else text
    return text if ours else f"{type(error).__name__}: {text} ({DEBUG}=1 shows where)"


def _warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    """A warning in one line, without the place in the code."""
    return f"{_who()}: {category.__name__}: {' '.join(str(message).split())}\n"


def _hint(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f" (forged-fx {context.info_name} --help)" if context is not None and context.parent is not None else ""


def _say(text: str) -> None:
    print(f"{_who()}: {text}", file=sys.stderr)


def _who() -> str:
    rank = os.environ.get("RANK")
    return "forged-fx" if rank is None else f"forged-fx, process {rank}"


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _handle(handler: Any) -> Any:
    """Set what SIGTERM does; returns what it did. Only a program's main thread may."""
    if _is_main_thread():
        return signal.signal(signal.SIGTERM, handler)
    return None


def _as_interruption(number: int, frame: FrameType | None) -> None:
    """What a cluster sends before it kills: it is treated as Ctrl-C, so that what was done is kept."""
    raise KeyboardInterrupt
