"""The frame of the page: its looks, the one script that may run in it, and nothing from a network."""

import base64
import hashlib
import html
from importlib.resources import files

from forged_fx.report.run import Choice, Run
from forged_fx.report.sections import SECTIONS

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="forged_fx">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def page(run: Run | Choice) -> str:
    """The page, as text. ImportError: `pip install forged_fx[report]`."""
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    body = "\n".join(filter(None, (section(run) for section in SECTIONS[type(run)])))
    return _PAGE.format(title=html.escape(run.title), policy=policy, style=style, script=script, body=body)
