"""The pages drawn without a reader: their figures, captions and refusals, as a browser at the same address has them.

So a report and ``haltscale figures`` show what the pages show, and there is one place that draws each figure.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from haltscale.dashboard import layout
from haltscale.dashboard.export import Provenance
from haltscale.platform.store import StoreError

APP = Path(__file__).with_name("app.py")
SECONDS = 600
_alone = threading.Lock()
"""The store's root is of the process, and so is what collects the figures: one page at a time."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure of a page."""

    name: str
    """Of its files: the page and the figure's own name."""
    figure: go.Figure
    behind: pd.DataFrame
    about: Provenance
    alt: str


@dataclass(frozen=True, kw_only=True)
class Said:
    """Words of a page."""

    kind: str
    """title, header, subheader, markdown, caption, info, warning or error."""
    text: str
    """Markdown."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page as it stands at an address."""

    parts: list[Chart | Said | pd.DataFrame]
    """What it shows, downwards."""

    @property
    def charts(self) -> list[Chart]:
        return [part for part in self.parts if isinstance(part, Chart)]


def names() -> list[str]:
    """The pages there are, by the names that their addresses have."""
    return [entry["page"].stem for entry in layout.pages(APP.parent / "app_pages")]


def draw(root: str, page: str, query: Mapping[str, str | Sequence[str]]) -> Page:
    """A page over a store.

    Args:
        root: of the store.
        page: one of :func:`names`.
        query: of the address, with ``study``.

    Raises:
        StoreError: there is no such page, or it cannot be drawn.
    """
    from streamlit.testing.v1 import AppTest

    if page not in names():
        raise StoreError(f"the page must be one of {', '.join(names())} (got {page!r})")
    for name in ("scriptrunner_utils.script_run_context", "caching.cache_data_api"):  # both say: there is no server
        logging.getLogger(f"streamlit.runtime.{name}").setLevel(logging.ERROR)
    with _alone, _store_at(root), layout.collecting() as drawn:
        app = AppTest.from_file(str(APP), default_timeout=SECONDS)
        for name, value in query.items():
            app.query_params[name] = value if isinstance(value, str) else list(value)
        app.session_state["only"] = page  # every visit begins on the first page, which need not be drawn
        app.run()
        app.switch_page(f"app_pages/{page}.py").run()
        if app.exception:
            raise StoreError(f"the page {page} cannot be drawn ({app.exception[0].message})")
        charts = [
            Chart(name=f"{page}-{one.key}", figure=one.figure, behind=one.behind, about=one.about, alt=one.alt)
            for one in drawn
        ]
        return Page(parts=list(_read(app.main, iter(charts))))


@contextmanager
def _store_at(root: str) -> Iterator[None]:
    before = os.environ.get("HALTSCALE_STORE")
    os.environ["HALTSCALE_STORE"] = root
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("HALTSCALE_STORE")
        else:
            os.environ["HALTSCALE_STORE"] = before


WORDS = ("title", "header", "subheader", "markdown", "caption", "info", "warning", "error")


def _read(block: Any, charts: Iterator[Chart]) -> Iterator[Chart | Said | pd.DataFrame]:
    """What a page shows, in its order; a chart is drawn where the page drew one."""
    for child in block.children.values():
        kind = str(getattr(child, "type", ""))
        if kind == "plotly_chart":
            yield next(charts)
        elif kind in WORDS:
            yield Said(kind=kind, text=str(child.value))
        elif kind in ("arrow_data_frame", "dataframe"):
            yield child.value
        elif hasattr(child, "children"):
            yield from _read(child, charts)
