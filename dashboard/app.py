"""The dashboard's entry point: ``haltscale dashboard``, or ``streamlit run dashboard/app.py``.

A new page is one file in ``app_pages/``: TITLE, ICON and ORDER at its top list it, its docstring is its tooltip, and
its last line hands a function that draws a study to :func:`haltscale.dashboard.layout.live`.
"""

from pathlib import Path

import streamlit as st

from haltscale.dashboard import layout, style

st.set_page_config(page_title="haltscale", page_icon=style.MARK, layout="wide")

st.logo(style.WORDMARK, size="large")
st.html(style.READABLE)

entries = layout.pages(Path(__file__).parent / "app_pages")
page = st.navigation(
    [
        st.Page(entry["page"], title=entry["title"], icon=entry["icon"], help=entry["help"], default=index == 0)
        for index, entry in enumerate(entries)
    ]
)
if layout.sidebar():
    page.run()
else:
    layout.empty()
