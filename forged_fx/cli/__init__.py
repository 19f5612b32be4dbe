"""The terminal: `forged-fx COMMAND`, or `python -m forged_fx COMMAND`.

    main.py      the commands, and what becomes of errors, interruptions and exit codes
    options.py   arguments that several commands take, and how numbers are written
    understood.py  what the arguments say, held against the library's tables before anything is loaded
    given.py     what the arguments name: the model, its images, its forged copy
    output.py    what is printed: a table for people, or one JSON document

Each other file is the command of its name: `EXAMPLE`, a call that works, and `run`, whose arguments are the command's.
To add a command: a file, and its name in `main.COMMANDS`.
"""

from forged_fx.cli.main import main

__all__ = ["main"]
