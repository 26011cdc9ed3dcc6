"""The pages drawn without a reader: their figures, captions and refusals, as a browser at the same address has them.

So a report and ``haltscale figures`` show what the pages show, and there is one place that draws each figure.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page as it stands at an address."""

    title: str
    charts: list[Chart]
    said: list[str] = field(default_factory=list)
    """Headings of verdicts, and what is refused, in the page's order; Markdown."""


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
    logging.getLogger("streamlit.runtime.scriptrunner_utils.script_run_context").setLevel(logging.ERROR)
    with _alone, _store_at(root), layout.collecting() as drawn:
        app = AppTest.from_file(str(APP), default_timeout=SECONDS)
        for name, value in query.items():
            app.query_params[name] = value if isinstance(value, str) else list(value)
        app.session_state["only"] = page  # every visit begins on the first page, which need not be drawn
        app.run()
        app.switch_page(f"app_pages/{page}.py").run()
        if app.exception:
            raise StoreError(f"the page {page} cannot be drawn ({app.exception[0].message})")
        captions, said = _read(app.main)
        charts = [
            Chart(
                name=f"{page}-{one.key}", figure=one.figure, behind=one.behind, about=one.about, alt=one.alt,
                caption=captions.get(place, ""),
            )
            for place, one in enumerate(drawn)
        ]  # fmt: skip
        return Page(title=str(app.title[0].value) if app.title else page, charts=charts, said=said)


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


def _read(block: Any) -> tuple[dict[int, str], list[str]]:
    """The caption behind each figure, by the figure's place, and what the page says in words."""
    captions: dict[int, str] = {}
    said: list[str] = []
    seen = -1

    def walk(node: Any) -> None:
        nonlocal seen
        for child in node.children.values():
            kind = getattr(child, "type", "")
            if kind == "plotly_chart":
                seen += 1
            elif kind == "caption" and seen >= 0 and seen not in captions:
                captions[seen] = str(child.value)
            elif kind in ("info", "warning", "error"):
                said.append(str(child.value))
            if hasattr(child, "children"):
                walk(child)

    walk(block)
    return captions, said
