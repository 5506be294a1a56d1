"""One self-contained HTML file, readable on a phone and on a desk."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from lightning_compress.files import replacing, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["html_table", "picture", "save_picture", "write_page"]

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}
.wide{overflow-x:auto;background:linear-gradient(90deg,#fff 40%,#fff0) 0/2rem local no-repeat,\
linear-gradient(270deg,#fff 40%,#fff0) 100%/2rem local no-repeat,linear-gradient(90deg,#0004,#0000) 0/.7rem no-repeat,\
linear-gradient(270deg,#0004,#0000) 100%/.7rem no-repeat}
table{border-collapse:collapse;font-size:.86rem;white-space:nowrap}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e2e2e2}
th{white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
img{max-width:100%;height:auto;display:block}figure{margin:0 0 1rem}figcaption{color:#555;font-size:.86rem}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(7.4rem,1fr));gap:.6rem}
.facts{margin:1rem 0;padding:0;list-style:none}
.facts li{background:#f3f6fa;border-radius:.4rem;padding:.5rem .8rem}
dt{font-weight:600}dd{margin:0 0 .4rem;overflow-wrap:anywhere}summary{cursor:pointer}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
tr.pale td{color:#707070}tr.chosen td{font-weight:600;background:#eef6ee}
.facts b{display:block;font-size:1.25rem}.warning{color:#8a3b00}.missed,tr.missed td{color:#b00020;font-weight:bold}
.legend{color:#555;font-size:.86rem;margin:.3rem 0}
"""


def write_page(path: Path, title: str, body: Sequence[str]) -> None:
    """Write the parts of a body as a page."""
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    write_whole(path, page)


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure as a file."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def picture(figure: Figure, caption: str) -> str:
    """A figure, inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def html_table(
    names: Sequence[str], rows: Sequence[Sequence[str]], classes: Sequence[str] = (), links: Sequence[str] = ()
) -> str:
    """A table that scrolls sideways where it is too wide.

    Args:
        names: Of the columns.
        rows: The cells.
        classes: One for each row, where there are some.
        links: Where the first cell of each row leads to; empty for nowhere.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = ""
    for i, row in enumerate(rows):
        kind = f' class="{classes[i]}"' if classes and classes[i] else ""
        cells = [html.escape(cell) for cell in row]
        if links and links[i]:
            cells[0] = f'<a href="{html.escape(quote(links[i]))}">{cells[0]}</a>'
        body += f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
