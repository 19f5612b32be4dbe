"""Tables, figures, prose. Whatever text comes in is escaped here."""

import html
import io
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from forged_fx.extras import need
from forged_fx.rows import figures

SMALL = 64  # pixels a side: below, an image is shown with its pixels


def section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def picture(title: str, legend: str, svg: str) -> str:
    """legend: markup."""
    return f"<figure><h2>{html.escape(title)}</h2><figcaption>{legend}</figcaption>{svg}</figure>"


def legend(keys: Mapping[str, str]) -> str:
    """What each colour stands for: its name in the style sheet -> words."""
    pairs = (f'<span class="key {name}"></span>{text(what)}' for name, what in keys.items())
    return "".join(f'<span class="keyed">{pair}</span>' for pair in pairs)


def table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], first: bool = False, sortable: bool = False
) -> str:
    """A table. first: the first row is the one to read. sortable: by a click on a heading."""
    shown = [[str(cell) for cell in row] for row in rows]
    flush = figures(shown, len(headings))

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [_wrap(cell) + (" n" if figure else "") for figure, cell in zip(flush, cells, strict=True)]
        inner = [f"<button>{text(c)}</button>" if sortable and tag == "th" and c else text(c) for c in cells]
        return "".join(f'<{tag} class="{k}">{c}</{tag}>' for k, c in zip(kinds, inner, strict=True))

    body = "".join(f'<tr class="{"first" * (first and not i)}">{line(row, "td")}</tr>' for i, row in enumerate(shown))
    head = f"<thead><tr>{line(headings, 'th')}</tr></thead>"
    return f'<div class="wide"><table class="{"sortable" * sortable}">{head}<tbody>{body}</tbody></table></div>'


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms, and what each means."""
    return f"<dl>{''.join(f'<dt>{html.escape(term)}</dt><dd>{html.escape(what)}</dd>' for term, what in pairs)}</dl>"


def share(part: float, n: int) -> str:
    return f"{100 * part:.1f} % ({round(part * n)})"


def text(plain: str) -> str:
    """Escaped, and with each percent sign kept beside its number."""
    return html.escape(plain).replace(" %", "&nbsp;%")


def prose(markdown: str) -> str:
    """Paragraphs of this project's docs: `code`, *emphasis*, and links, of which the words remain."""
    found = html.escape(markdown, quote=False)
    found = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", found)
    parts = re.split(r"`([^`]*)`", found)  # what stands between backquotes is taken as it is
    parts[::2] = [re.sub(r"\*([^*\n]+(?:\n[^*\n]+)*)\*", r"<em>\1</em>", part) for part in parts[::2]]
    parts[1::2] = [f"<code>{part}</code>" for part in parts[1::2]]
    return "".join(f"<p>{paragraph}</p>" for paragraph in re.split(r"\n\s*\n", "".join(parts).strip()))


def image(pixels: Tensor, says: str) -> str:
    """An <img> of (channels, height, width) in [0, 1], 1 or 3 channels; says: what a reader who cannot see it is told.

    ImportError: `pip install forged_fx[report]`.
    """
    grey = (pixels.clamp(0, 1) * 255).round().byte()
    array = grey[0] if len(grey) == 1 else grey.permute(1, 2, 0)
    file = io.BytesIO()
    need("PIL.Image", "report").fromarray(array.contiguous().numpy()).save(file, format="PNG", optimize=True)
    small = "small" if max(pixels.shape[1:]) <= SMALL else ""
    data = b64encode(file.getvalue()).decode()
    return f'<img class="{small}" alt="{html.escape(says)}" src="data:image/png;base64,{data}">'


def _wrap(cell: str) -> str:
    """How a cell's text may break, where the page is narrow: a word or two never, a sentence not into a column."""
    return "short" if len(cell) < 15 else "long" if len(cell) > 32 else ""
