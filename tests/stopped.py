"""Runs that are stopped in the middle."""

from typing import Any

import pytest

from forged_fx.evaluate.journal import Journal

KEEP = Journal.keep


def stop_after(blocks: int, patch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once so many more blocks of a run are kept."""

    def limited(self: Journal, *args: Any) -> None:
        nonlocal blocks
        blocks -= 1
        if blocks < 0:
            raise KeyboardInterrupt
        KEEP(self, *args)

    patch.setattr(Journal, "keep", limited)
