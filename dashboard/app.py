"""The dashboard's entry point: ``haltscale dashboard``, or ``streamlit run dashboard/app.py``."""

from pathlib import Path

import streamlit as st
from haltscale.dashboard import shell, style

st.set_page_config(page_title="haltscale", page_icon=":material/hourglass_top:", layout="wide")

st.logo(style.WORDMARK, size="large")

entries = shell.pages(Path(__file__).parent / "app_pages")
page = st.navigation(
    [
        st.Page(entry["page"], title=entry["title"], icon=entry["icon"], help=entry["help"], default=index == 0)
        for index, entry in enumerate(entries)
    ]
)
if shell.sidebar():
    page.run()
else:
    shell.empty()
