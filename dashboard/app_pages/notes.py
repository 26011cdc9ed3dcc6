"""What has been pinned to this study, in the order of its report."""

import subprocess
import sys
import tempfile
from pathlib import Path

import streamlit as st

from haltscale.dashboard import layout
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import StudyView
from haltscale.dashboard.notes import MOST_TEXT, MOST_TITLE, Note, NoteError, Notes

TITLE = "Report"
ICON = ":material/push_pin:"
ORDER = 8.5
FOLDER = Path(__file__).parent
SECONDS = 900


def body(view: StudyView) -> None:
    layout.heading(view, "Report", says="Which views make the report of this study, in which order?")
    notes = Notes(store(), view.name)
    found, damaged = notes.all()
    if damaged:
        st.warning(
            f"{len(damaged)} notes cannot be read and are left out: {layout.plain(', '.join(damaged[:5]))} in "
            f"{layout.plain(layout.short(str(notes.folder)))}. Remove the files, and pin the views again.",
            icon=":material/broken_image:",
        )
    if not found:
        st.info(
            "No view is pinned to this study. Open a page, choose what it shows, and press **Link and pin** beside its "
            "title. The report then has the pinned views in their order; without any it has the main pages.",
            icon=":material/push_pin:",
        )
    for place, note in enumerate(found):
        one(notes, note, place, len(found))
    with st.container(border=True):
        st.header("The report as one file", anchor=False)
        st.markdown("An HTML page that needs no server and no network. On the command line:")
        st.code(f"haltscale report {view.name} --out {view.name}.html", language=None)
        layout.download("Report, HTML", lambda: report(view.name), f"{view.name}.html", "text/html")
        st.caption("Drawing all of its figures takes up to a minute.")


def one(notes: Notes, note: Note, place: int, count: int) -> None:
    """A note, with what can be done with it."""
    with st.container(border=True):
        st.header(f"{place + 1}. {layout.plain(note.title)}", anchor=False)
        if note.text:
            st.markdown(layout.plain(note.text).replace("\n", "  \n"))
        with st.container(horizontal=True, vertical_alignment="center"):
            if (FOLDER / f"{note.page}.py").is_file():
                st.page_link(
                    f"app_pages/{note.page}.py", label="Open the view", icon=":material/open_in_new:",
                    query_params={name: list(values) for name, values in note.query.items()},
                )  # fmt: skip
            for by, label, icon in ((-1, "Up", ":material/arrow_upward:"), (1, "Down", ":material/arrow_downward:")):
                if st.button(label, icon=icon, key=f"move-{note.id}-{by}", disabled=not 0 <= place + by < count):
                    done(lambda by=by: notes.move(note, by))
            with st.popover("Edit", icon=":material/edit:"), st.form(f"edit-{note.id}", border=False):
                title = st.text_input("Title", note.title, max_chars=MOST_TITLE, key=f"title-{note.id}")
                text = st.text_area("Text", note.text, max_chars=MOST_TEXT, key=f"text-{note.id}")
                if st.form_submit_button("Save"):
                    done(lambda: notes.change(note, title=title, text=text))
            with st.popover("Remove", icon=":material/delete:"):
                st.markdown("The note is removed for good.")
                if st.button("Remove this note", key=f"remove-{note.id}"):
                    done(lambda: notes.remove(note))


def done(change) -> None:  # type: ignore[no-untyped-def]
    """Make a change and draw the page again, or say why not."""
    try:
        change()
    except (NoteError, OSError) as error:
        st.error(layout.plain(error), icon=":material/error:")
    else:
        st.rerun()


def report(study: str) -> bytes:
    """The file, made by a process of its own: it draws pages, which a server cannot do beside its readers."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.html"
        line = [sys.executable, "-m", "haltscale.dashboard.html_report", study]
        line += ["--out", str(out), "--store", store().root]
        made = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS, check=False)
        return out.read_bytes() if made.returncode == 0 else made.stderr.encode()


layout.live(body)
