"""One HTML file that holds all it shows, pictures included, and needs neither network nor scripts from elsewhere.

Owns: `Page` and the pieces on it, escaping. Does not own: charts (`charts`), what is reported (`studies`).
"""

import base64
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from dalle_torch.storage import atomic_file

Cell = str | int | float | bool | None


class Page:
    """A page that is written from top to bottom.

    Args:
        title: of the window and the first heading.
        subtitle: a line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if subtitle:
            self._parts.append(f'<p class="subtitle">{escape(subtitle)}</p>')

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{escape(text)}</p>")

    def notice(self, text: str) -> None:
        """What nobody should overlook, such as a score that is not the standard one."""
        self._parts.append(f'<p class="notice">{escape(text)}</p>')

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, caption: str = "") -> None:
        """A table; a click on a column's name sorts by it.

        Args:
            columns: names; the text before a line break in them is the name, what follows is shown small.
            rows: numbers stand right, everything else left.
        """
        head = "".join(f"<th>{_column(name)}</th>" for name in columns)
        body = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
        title = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._parts.append(
            f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def facts(self, values: Mapping[str, Any]) -> None:
        """Names and values, nested ones indented as JSON."""
        rows = "".join(
            f"<tr><th>{escape(str(name))}</th><td>{_value(value)}</td></tr>" for name, value in values.items()
        )
        self._parts.append(f'<table class="facts">{rows}</table>')

    def links(self, links: Sequence[tuple[str, str]], *, current: str = "") -> None:
        """Texts and addresses on one line, that of this very page (`current`) without a link."""
        parts = (
            f"<b>{escape(text)}</b>" if address == current else f'<a href="{escape(address)}">{escape(text)}</a>'
            for text, address in links
        )
        self._parts.append(f"<p>{' '.join(parts)}</p>")

    def image(self, image: Image.Image, alt: str = "", *, width: int | None = None) -> None:
        """One picture; `width` in CSS pixels."""
        size = f' style="width:{width}px"' if width else ""
        self._parts.append(f'<img class="figure" src="{data_uri(image)}" alt="{escape(alt)}"{size}>')

    def png(self, data: bytes, alt: str = "") -> None:
        """A picture that is a PNG already, such as a chart."""
        self._parts.append(f'<img class="figure" src="{_uri(data, "png")}" alt="{escape(alt)}">')

    def gallery(
        self,
        images: Sequence[Image.Image | str],
        captions: Sequence[str] | None = None,
        *,
        alts: Sequence[str] | None = None,
        width: int = 128,
    ) -> None:
        """Pictures beside each other, as many in a row as fit, each with its caption; files open by a click.

        Args:
            images: pictures, which go into the page, or addresses of files beside it.
            alts: what is read out in place of each picture, such as its prompt; None: the captions.
            width: of each in CSS pixels; small pictures are enlarged pixel by pixel.
        """
        texts = captions if captions is not None else [""] * len(images)
        figures = []
        for image, text, alt in zip(images, texts, texts if alts is None else alts, strict=True):
            source = escape(image) if isinstance(image, str) else data_uri(image)
            picture = f'<img loading="lazy" src="{source}" alt="{escape(alt)}">'
            if isinstance(image, str):
                picture = f'<a href="{source}">{picture}</a>'
            label = f"<figcaption>{escape(text)}</figcaption>" if text else ""
            figures.append(f'<figure style="width:{width}px">{picture}{label}</figure>')
        self._parts.append(f'<div class="gallery">{"".join(figures)}</div>')

    def render(self) -> str:
        """The whole page."""
        return _PAGE.format(title=escape(self.title), style=_STYLE, body="\n".join(self._parts), script=_SCRIPT)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, whole or not at all.

        Raises:
            OSError: it cannot be written there.
        """
        with atomic_file(path) as temporary:
            # Half a UTF-16 pair may come in with a caption, and no file can hold it.
            temporary.write_text(self.render(), encoding="utf-8", errors="replace")


def data_uri(image: Image.Image, *, lossy: bool = False) -> str:
    """The picture itself as an address, PNG or, where fine differences do not matter, JPEG of a tenth of the size."""
    buffer = io.BytesIO()
    if lossy:
        image.convert("RGB").save(buffer, format="JPEG", quality=88)
        return _uri(buffer.getvalue(), "jpeg")
    image.save(buffer, format="PNG")
    return _uri(buffer.getvalue(), "png")


def number(value: float) -> str:
    """A number as a table shows it: four digits that mean something, thousands apart."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _column(name: str) -> str:
    first, _, rest = name.partition("\n")
    return escape(first) + (f"<br><small>{escape(rest)}</small>" if rest else "")


def _cell(value: Cell) -> str:
    if value is None:
        return "<td>–</td>"
    if isinstance(value, (int, float)):
        # The full value sorts, and shows when the pointer rests on it.
        return f'<td class="number" data-value="{float(value)!r}" title="{value!r}">{number(value)}</td>'
    return f"<td>{escape(value)}</td>"


def _value(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        return f"<pre>{escape(json.dumps(value, indent=2, default=str, ensure_ascii=False))}</pre>"
    return escape(number(value)) if isinstance(value, float) else escape(str(value))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } .subtitle { margin-top: .2rem; opacity: .7; }
.notice { border-left: 4px solid #d80; background: var(--soft); padding: .5rem .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; opacity: .7; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { cursor: pointer; } td.number { text-align: right; }
.facts pre { margin: 0; white-space: pre-wrap; }
.figure { max-width: 100%; background: white; }
.gallery { display: flex; flex-wrap: wrap; gap: .6rem; margin: .8rem 0; }
figure { margin: 0; } figure img { width: 100%; image-rendering: pixelated; display: block; }
figcaption { font-size: 12px; line-height: 1.3; overflow-wrap: anywhere; }
"""

_SCRIPT = """
for (const head of document.querySelectorAll('thead th')) head.addEventListener('click', () => {
  const body = head.closest('table').tBodies[0], index = head.cellIndex;
  const key = row => row.cells[index].dataset.value ?? row.cells[index].textContent;
  const less = (a, b) => isNaN(key(a)) || isNaN(key(b)) ? key(a).localeCompare(key(b)) : key(a) - key(b);
  const sign = head.dataset.sorted === 'up' ? -1 : 1;
  head.dataset.sorted = sign > 0 ? 'up' : 'down';
  [...body.rows].sort((a, b) => sign * less(a, b)).forEach(row => body.append(row));
});
"""
