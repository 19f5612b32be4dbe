"""What docs/findings.md says about each finding: when it is raised, and what to do."""

import functools
import re
from importlib.resources import files


@functools.cache
def paragraphs() -> dict[str, str]:
    """A finding's name -> its text, in Markdown."""
    page = files(__package__).joinpath("findings.md").read_text(encoding="utf-8")  # a link to docs/findings.md
    _, *parts = re.split(r"^## (.+)$", page, flags=re.MULTILINE)
    return {name.strip(): text.strip() for name, text in zip(parts[::2], parts[1::2], strict=True)}
