"""Figures and tables as files for a paper: at the width of its columns, with what they were made of inside the file.

Pictures are drawn by kaleido with an installed Chromium or Chrome (``pip install 'haltscale[figures]'``), which reach
no network. Where the provenance stands: SVG ``<metadata>``, PDF document information (``/Provenance``), PNG text chunk
(``Provenance``), Parquet schema metadata (``haltscale``); a CSV file stays a plain table with a
``NAME.csv-metadata.json`` (CSV on the Web) beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq

from haltscale.platform.provenance import git_commit

FORMATS = ("svg", "pdf", "png")
MIME = {"svg": "image/svg+xml", "pdf": "application/pdf", "png": "image/png"}
DPI = 300
ROOMY = 1.5
"""Figures are laid out this much larger than on paper, and scaled down: text of 10.5 pt becomes 7 pt."""
TEXT_POINTS = 7
LEAST_HIGH = 200
CSS_DPI = 96
MOST_KEYS = 500
NEEDS = (
    "SVG, PDF and PNG need kaleido, pypdf and a Chromium or Chrome: pip install 'haltscale[figures]', and Debian's "
    "chromium (or BROWSER_PATH=/path/to/chrome)"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEY = "haltscale"
"""Of the provenance in a Parquet schema and a CSV's metadata."""


class ExportError(RuntimeError):
    """A picture cannot be drawn on this machine; the message says what to install."""


class Width(StrEnum):
    """How wide a figure is on paper."""

    SINGLE = "single"
    DOUBLE = "double"

    @property
    def millimetres(self) -> float:
        """Of one column and of the whole page, as most journals have them."""
        return {Width.SINGLE: 89.0, Width.DOUBLE: 183.0}[self]

    @property
    def named(self) -> str:
        return f"{self.value} column, {self.millimetres:g} mm"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a figure or a table was made of."""

    study: str
    title: str
    keys: Sequence[str] = ()
    """Of the runs behind it."""
    commits: Sequence[str] = ()
    """Of the code that trained them."""
    view: str = ""
    """The page with its choices, as the dashboard's address has them."""

    def document(self) -> dict[str, Any]:
        """As JSON has it. Of more than :data:`MOST_KEYS` runs the first are listed, and a digest is of all."""
        keys = list(dict.fromkeys(map(str, self.keys)))
        found: dict[str, Any] = {"title": self.title, "study": self.study, "runs": len(keys), "keys": keys[:MOST_KEYS]}
        if len(keys) > MOST_KEYS:
            found["keys_sha256"] = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
        found |= {"training_commits": sorted({one for one in self.commits if one})}
        return found | {"view": self.view, "drawn_by": drawn_by()}

    def text(self) -> str:
        return json.dumps(self.document(), ensure_ascii=False)


@cache
def drawn_by() -> str:
    """Version and commit of the code that draws."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("haltscale")
        return f"haltscale {version} {git_commit()}".strip()
    return f"haltscale {git_commit()}".strip()


# ---- pictures ------------------------------------------------------------------------------------


@cache
def browser() -> str | None:
    """The path of a Chromium or Chrome: ``BROWSER_PATH``, else the first that is installed."""
    return os.environ.get("BROWSER_PATH") or next((path for name in BROWSERS if (path := shutil.which(name))), None)


def can_draw() -> bool:
    """Whether this machine can make pictures."""
    return browser() is not None and all(importlib.util.find_spec(name) for name in ("kaleido", "pypdf"))


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Within it one browser draws all pictures, in place of one each.

    Raises:
        ExportError: this machine cannot draw.
    """
    kaleido = _kaleido()
    kaleido.start_sync_server(mathjax=False, silence_warnings=True)
    _kept.append(True)
    try:
        yield
    finally:
        _kept.pop()
        kaleido.stop_sync_server(silence_warnings=True)


_kept: list[bool] = []
"""Whether a browser is being kept."""


def _kaleido() -> Any:
    if not can_draw():
        raise ExportError(NEEDS)
    os.environ["BROWSER_PATH"] = browser() or ""
    import kaleido

    return kaleido


def picture(figure: go.Figure, kind: str, width: Width, about: Provenance) -> bytes:
    """A figure at a column's width, in type of 7 points.

    Args:
        kind: one of :data:`FORMATS`.

    Raises:
        ExportError: this machine cannot draw.
    """
    if kind not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)} (got {kind!r})")
    kaleido = _kaleido()
    inches = width.millimetres / 25.4
    across = round(inches * CSS_DPI * ROOMY)
    high = _height(figure, across)
    scale = DPI / (CSS_DPI * ROOMY) if kind == "png" else 1.0
    options = {"format": kind, "width": across, "height": high, "scale": scale}
    copy = on_paper(figure)
    more = {} if _kept else {"kopts": {"mathjax": False}}
    try:
        drawn = bytes(kaleido.calc_fig_sync(copy.to_dict(), opts=options, **more))
    except Exception as error:  # of the browser, of many kinds
        raise ExportError(f"the browser {browser()} drew no figure ({error}); {NEEDS}") from error
    return {"svg": _svg, "pdf": _pdf, "png": _png}[kind](drawn, about, inches)


def _height(figure: go.Figure, across: int) -> int:
    """On the screen a figure has most of the page's width; narrower ones keep more of their height than of that."""
    high = float(figure.layout.height or 450)
    return max(round(high * min(across / 1100, 1.0) ** 0.35), LEAST_HIGH)


def on_paper(figure: go.Figure) -> go.Figure:
    """A copy in black on white, without what only a screen has."""
    margin = {"l": 8, "r": 8, "t": figure.layout.margin.t or 30, "b": 8}
    size = TEXT_POINTS * ROOMY * CSS_DPI / 72
    return go.Figure(figure).update_layout(
        template="plotly_white",
        font={"size": size, "family": "Helvetica, Arial, Liberation Sans, sans-serif", "color": "#000"},
        margin=margin,
        title=None,
    )


def _svg(drawn: bytes, about: Provenance, inches: float) -> bytes:
    text = drawn.decode()
    head = re.match(r"(?:<\?xml[^>]*\?>)?\s*<svg[^>]*>", text)
    if head is None:
        raise ExportError("the browser drew no SVG")
    tall = re.search(r' height="([\d.]+)"', head[0])
    high = float(tall[1]) / ROOMY / CSS_DPI if tall else inches
    opened = re.sub(r' height="[\d.]+"', f' height="{high:.4f}in"', head[0], count=1)
    opened = re.sub(r' width="[\d.]+"', f' width="{inches:.4f}in"', opened, count=1)
    said = html.escape(_without_controls(about.text()), quote=False)
    titled = f"<title>{html.escape(_without_controls(about.title))}</title><metadata>{said}</metadata>"
    return (opened + titled + text[head.end() :]).encode()


def _without_controls(text: str) -> str:
    """XML allows no control characters."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _pdf(drawn: bytes, about: Provenance, inches: float) -> bytes:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(drawn))
    for page in writer.pages:
        page.scale_by(72 * inches / float(page.mediabox.width))
    writer.metadata = {"/Title": about.title, "/Creator": drawn_by(), "/Provenance": about.text()}
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def _png(drawn: bytes, about: Provenance, _inches: float) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    said = PngInfo()
    said.add_itxt("Title", about.title)
    said.add_itxt("Provenance", about.text())
    out = io.BytesIO()
    with Image.open(io.BytesIO(drawn)) as image:
        image.save(out, format="PNG", pnginfo=said, dpi=(DPI, DPI))
    return out.getvalue()


# ---- tables --------------------------------------------------------------------------------------


def csv(frame: pd.DataFrame) -> bytes:
    """A table as CSV, without an index."""
    return str(frame.to_csv(index=False)).encode(errors="replace")


def csv_metadata(name: str, about: Provenance) -> bytes:
    """What stands beside a CSV file, as ``NAME.csv-metadata.json``."""
    document = {"@context": "http://www.w3.org/ns/csvw", "url": name, "dc:title": about.title, KEY: about.document()}
    return json.dumps(document, indent=1, ensure_ascii=False).encode()


def parquet(frame: pd.DataFrame, about: Provenance | None = None) -> bytes:
    """A table as Parquet, with its provenance in the schema's metadata."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    if about is not None:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), KEY.encode(): about.text().encode()})
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def files(
    name: str,
    figure: go.Figure,
    behind: pd.DataFrame,
    about: Provenance,
    *,
    widths: Iterable[Width] = tuple(Width),
    formats: Iterable[str] = FORMATS,
) -> Iterator[tuple[str, bytes]]:
    """A figure's files, by name: its data, and its pictures at each width.

    Raises:
        ExportError: pictures are asked for and this machine cannot draw.
    """
    yield f"{name}.csv", csv(behind)
    yield f"{name}.csv-metadata.json", csv_metadata(f"{name}.csv", about)
    yield f"{name}.parquet", parquet(behind, about)
    for kind in formats:
        for width in widths:
            yield f"{name}-{width}.{kind}", picture(figure, kind, width, about)


def archive(members: Callable[[], Iterable[tuple[str, bytes]]]) -> bytes:
    """Files as one ZIP."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members():
            file.writestr(name, content)
    return out.getvalue()
