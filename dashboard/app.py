"""The dashboard's entry point: ``haltscale dashboard``, or ``streamlit run dashboard/app.py``.

Streamlit imports this file to know what it serves, and runs it as a script for every reader.

A new page is one file in ``app_pages/``, or a module of another package (entry points of the group
``haltscale.pages``): TITLE, ICON and ORDER at its top list it, its docstring is its tooltip, and its last line hands a
function that draws a study to :func:`haltscale.dashboard.layout.live`.
"""

from pathlib import Path

import streamlit as st


def draw() -> None:
    """The page that the address names, or what to do where there is no study."""
    from haltscale.dashboard import layout, style

    st.set_page_config(page_title="haltscale", page_icon=style.MARK, layout="wide")
    st.logo(style.WORDMARK, size="large")
    st.html(style.READABLE)
    entries = layout.pages(Path(__file__).parent / "app_pages")
    page = st.navigation(
        [
            st.Page(
                entry["page"],
                title=entry["title"],
                icon=entry["icon"],
                url_path=entry["url_path"],
                help=entry["help"],
                default=index == 0,
            )
            for index, entry in enumerate(entries)
        ]
    )
    st.session_state["page-name"] = page.url_path or entries[0]["page"].stem
    if layout.sidebar():
        page.run()
    else:
        layout.empty()


if __name__ == "__main__":
    draw()
else:
    from starlette.middleware import Middleware

    from haltscale.dashboard import fits
    from haltscale.dashboard.guard import Guard

    fits.fitter.apart = True

    app = st.App(__file__, middleware=[Middleware(Guard)])
