"""What every page shares: the cached store, the sidebar, live following, and the states a page can be in.

A page is a script in ``app_pages/``. It gets its study from :func:`live`, which draws the page's body again whenever
something new may have been written, without a reload and without touching the reader's choices.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from haltscale.dashboard import data, export, figures, fits, style
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import FlopsKind, StudyView
from haltscale.dashboard.notes import MOST_TEXT, MOST_TITLE, NoteError, Notes

log = logging.getLogger(__name__)

ACTIVE_SECONDS = 3.0
"""How often a page looks at the store while a run is being trained."""
IDLE_SECONDS = 10.0
FITTING_SECONDS = 1.0
MOST_PILLS = 8
PARQUET = "application/vnd.apache.parquet"
PLOTLY = {"displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}
SUBMIT = "make study"
DEMO = "haltscale dashboard --demo"
SUBMIT_RAY = (  # `haltscale up` tells the address
    "export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265 RAY_AUTH_MODE=token\n"
    "ray job submit --working-dir . -- python -m haltscale.studies.quickstart"
)


# ---- the sidebar ---------------------------------------------------------------------------------


FILTERS = {
    "method": "Methods",
    "size": "Sizes",
    "nominal": "Budgets, realised FLOPs",
    "lam": "λ, the price of a latent step",
    "beta": "β, how far a right answer halts",
    "l_max": "l_max, most latent steps",
    "seed": "Seeds",
}
"""By facet; the labels of the sidebar."""


def sidebar() -> bool:
    """Draw the study's choice and the filters; False when there is no study to choose."""
    shelf = store()
    names = shelf.studies()
    with st.sidebar:
        if names:
            st.selectbox("Study", names, key="study", bind="query-params")
            view = _load()
            st.session_state["just-read"] = view  # the page is drawn in the same run: it need not read it all again
            options = data.facets(view.runs)
            for name, title in FILTERS.items():
                if len(options[name]) > MOST_PILLS:
                    st.multiselect(title, options[name], key=name, bind="query-params", placeholder="All")
                elif len(options[name]) > 1:
                    st.pills(
                        title,
                        options[name],
                        selection_mode="multi",
                        key=name,
                        bind="query-params",
                        help="Choose none to see all.",
                        format_func=label,
                    )
        st.caption("Run store, read only")
        st.code(short(shelf.root), language=None, wrap_lines=True)
    return bool(names)


def _load() -> StudyView:
    """The chosen study, unfiltered."""
    return store().view(str(st.session_state["study"]))


def filtered(view: StudyView) -> StudyView:
    """The runs of a study that pass the sidebar's filters."""
    return data.select(view, **{name: st.session_state.get(name) or () for name in data.FACETS})


# ---- live ----------------------------------------------------------------------------------------


def live(body: Callable[[StudyView], None]) -> None:
    """Draw ``body`` now and again every few seconds, as a fragment: the rest of the page stays as it is.

    When what the sidebar offers has changed (a new study, method or size), or training begins or ends, the whole page
    runs once, so that its choices and its pace follow.
    """
    if st.session_state.get("only", st.session_state["page-name"]) != st.session_state["page-name"]:
        return
    known = _pulse(st.session_state["just-read"])

    @st.fragment(run_every=ACTIVE_SECONDS if known[-1] else IDLE_SECONDS)
    def follow() -> None:
        view = st.session_state.pop("just-read", None) or _load()
        if _pulse(view) != known:
            st.rerun()
        for problem in view.problems:
            if problem.where == view.name:
                st.error(
                    f"**This study cannot be read in full.** {plain(problem.what)}", icon=":material/broken_image:"
                )
                if view.runs.empty:
                    return
        if view.runs.empty:
            st.info("This study has planned no runs.", icon=":material/hourglass_empty:")
            return
        chosen = filtered(view)
        if chosen.runs.empty:
            st.info("No run passes the filters in the sidebar.", icon=":material/filter_alt_off:")
            return
        st.session_state["shown"], st.session_state["pending"] = chosen, False
        body(chosen)
        if st.session_state["pending"]:
            _watch_fits()

    follow()


def _pulse(view: StudyView) -> tuple[object, ...]:
    """What the whole page depends on; the last entry says whether something is being trained."""
    options = data.facets(view.runs)
    return (*store().studies(), *(tuple(options[name]) for name in options), view.active)


def empty() -> None:
    """The page of a store without a study: what this is, and the exact line to get one."""
    st.title("No study yet")
    st.markdown(
        "Here you will see **how much a language model gains from thinking before it speaks, and what that costs**: "
        "perplexity against training compute for every method and size, where the latent steps went, and the text "
        "itself with the steps each token got."
    )
    with st.container(border=True):
        st.markdown("**Start the quickstart study** from the project's folder; it runs in minutes on two CPU cores.")
        st.code(SUBMIT, language="bash")
        st.markdown("On a Ray cluster that is already up, submit it as a job:")
        st.code(SUBMIT_RAY, language="bash")
        st.markdown("Or look at a finished one first:")
        st.code(DEMO, language="bash")
        st.caption("This page shows the study as soon as its first file is there. No reload is needed.")

    @st.fragment(run_every=ACTIVE_SECONDS)
    def wait() -> None:
        if store().studies():
            st.rerun()

    wait()


# ---- small pieces --------------------------------------------------------------------------------


def short(root: str) -> str:
    """A store's root with the reader's home folder written as ``~``."""
    home = str(Path.home())
    return f"~{root.removeprefix(home)}" if root == home or root.startswith(f"{home}/") else root


def plain(text: object) -> str:
    """Text from the store as markdown that shows it literally."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~$:<>&=^])", r"\\\1", str(text))


def label(text: object) -> str:
    """Text from the store as the label of a widget's option, which is markdown too. Plain words stay as they are, since
    the label is also what the address says."""
    words = str(text)
    return words if re.fullmatch(r"[\w ]+([.,@/-][\w ]+)?", words) and "www." not in words else plain(words)


def heading(view: StudyView, title: str, says: str = "") -> None:
    """A page's title, in a line what it answers, the study's question, and how the study is going."""
    if _collected:
        st.title(title, anchor=False)
        st.caption(says)
        return
    left, right = st.columns([5, 1], vertical_alignment="top")
    left.title(title, anchor=False)
    if says:
        left.caption(says)
    with right, st.container(horizontal_alignment="right"):
        pin(view)
    counts = view.runs["state"].value_counts()
    badges = " ".join(
        f":{color}-badge[{style.STATE_ICONS[state]} {counts[state]} {state}]"
        for state, color in style.STATE_COLORS.items()
        if state in counts
    )
    question = f"{plain(view.question)}  \n" if view.question else ""
    st.markdown(question + badges)


def pin(view: StudyView) -> None:
    """The link to this view, and a form that pins it to the study's report."""
    with st.popover("Link and pin", icon=":material/push_pin:"):
        st.caption("The link to this view, with all that is chosen:")
        st.code(f"{st.context.url or ''}?{urlencode(query(), doseq=True)}", language=None, wrap_lines=True)
        with st.form("pin", clear_on_submit=True, border=False):
            title = st.text_input("Title", key="pin-title", max_chars=MOST_TITLE)
            text = st.text_area("Text", key="pin-text", max_chars=MOST_TEXT)
            pinned = st.form_submit_button("Pin to the report", icon=":material/push_pin:")
        if pinned:
            page = str(st.session_state["page-name"])
            try:
                Notes(store(), view.name).add(title=title, text=text, page=page, query=query())
            except (NoteError, OSError) as error:
                st.error(plain(error), icon=":material/error:")
            else:
                st.success("Pinned. The page Report lists it.", icon=":material/check_circle:")


def owner(view: StudyView) -> None:
    """Say which process is running the study, while one is."""
    if view.owner:
        st.caption(f":material/terminal: Run by {plain(view.owner)}.")


def flops_kind() -> FlopsKind:
    """The reader's choice of how FLOPs are counted; one choice for all pages, as it stands in the address."""
    choice = st.segmented_control(
        "Count FLOPs as",
        [kind.value for kind in FlopsKind],
        default=FlopsKind.REALISED.value,
        required=True,
        key="flops",
        bind="query-params",
        help="  \n".join(f"**{kind.value}**: {kind.meaning}." for kind in FlopsKind)
        + "  \nNumbers of two kinds never share an axis.",
    )
    return FlopsKind(choice)


def honest(view: StudyView) -> None:
    """Say what runs of minutes can show and what they cannot; a report says it once."""
    if view.demo and not _collected:
        st.caption(f":material/info: {view.limits}")


def download(title: str, content: str | Callable[[], bytes], name: str, mime: str) -> None:
    """A download: small text at once, or a function that builds a large file on the click."""
    st.download_button(
        title, data=content, file_name=name, mime=mime, on_click="ignore", icon=":material/download:", key=f"get-{name}"
    )


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure that a page has drawn, for whoever collects them."""

    key: str
    figure: go.Figure
    behind: pd.DataFrame
    about: export.Provenance
    alt: str


_collected: list[list[Drawn]] = []


@contextmanager
def collecting() -> Iterator[list[Drawn]]:
    """Within it every figure that a page of this process draws is put into a list, without its downloads."""
    drawn: list[Drawn] = []
    _collected.append(drawn)
    try:
        yield drawn
    finally:
        _collected.remove(drawn)


def is_collecting() -> bool:
    """Whether the page is drawn for a report or for files: nobody can press anything."""
    return bool(_collected)


def chart(figure: go.Figure, behind: pd.DataFrame, *, key: str, title: str, alt: str) -> None:
    """A figure with what it takes to use it elsewhere: the data behind it, and pictures at the widths of a paper.

    Args:
        behind: the data as numbers, with units in the column names where they have one; of the runs ``key``, where they
            are not all that are shown.
        key: names the figure on its page and its files.
        title: of the figure as a page of its own.
        alt: what a reader who does not see the figure should know.
    """
    name = f"{st.session_state['study']}-{key}"
    # The camera in the figure's own tool bar: a vector drawing, made by the reader's browser.
    camera = {"format": "svg", "filename": name, "scale": 1}
    st.plotly_chart(figure, key=key, config={**PLOTLY, "toImageButtonOptions": camera}, alt=alt)
    about = provenance(behind, title)
    if _collected:
        _collected[-1].append(Drawn(key=key, figure=figure, behind=behind, about=about, alt=alt))
        return
    with st.container(horizontal_alignment="right"), st.popover("Download", icon=":material/download:"):
        download("Data, CSV", lambda: export.csv(behind), f"{name}.csv", "text/csv")
        download("Data, Parquet", lambda: export.parquet(behind, about), f"{name}.parquet", PARQUET)
        download("Figure, HTML", lambda: figures.as_html(figure, title), f"{name}.html", "text/html")
        if not export.can_draw():
            st.caption(plain(export.NEEDS))
            return
        for width in export.Width:
            for kind in export.FORMATS:
                download(
                    f"{kind.upper()}, {width.named}",
                    partial(export.picture, figure, kind, width, about),
                    f"{name}-{width}.{kind}",
                    export.MIME[kind],
                )
        download(
            "All of these, ZIP",
            lambda: export.archive(lambda: export.files(name, figure, behind, about)),
            f"{name}.zip",
            "application/zip",
        )


def provenance(behind: pd.DataFrame, title: str) -> export.Provenance:
    """What a figure of this page is made of: the runs named in its data, else all that are shown."""
    runs = st.session_state["shown"].runs
    if "key" in behind:
        runs = runs[runs["key"].isin(behind["key"])]
    return export.Provenance(
        study=str(st.session_state["study"]),
        title=title,
        keys=list(runs["key"]),
        commits=sorted(set(runs["git_commit"])),
        view=address(),
    )


def query() -> dict[str, list[str]]:
    """What stands behind the ? of this page's address, always with the study."""
    found = {name: st.query_params.get_all(name) for name in st.query_params}
    return {"study": [str(st.session_state["study"])], **found}


def address() -> str:
    """This page and its choices, without the host."""
    return f"{st.session_state['page-name']}?{urlencode(query(), doseq=True)}"


def table(frame: pd.DataFrame, *, key: str, alt: str, **options: Any) -> None:
    """A table without an index, and its files."""
    st.dataframe(frame, hide_index=True, placeholder="–", key=key, alt=alt, **options)


def table_files(frame: pd.DataFrame, *, name: str, title: str) -> None:
    """Downloads of a table."""
    about = provenance(frame, title)
    download("CSV", lambda: export.csv(frame), f"{name}.csv", "text/csv")
    download("Parquet", lambda: export.parquet(frame, about), f"{name}.parquet", PARQUET)


LATEST = "latest"


def choose_step(found: list[int], *, key: str) -> int:
    """A slider over the evaluations whose last place is always the newest, so that a live page follows the run."""
    if len(found) < 2:
        st.markdown(f"Training step  \n**{found[0]:,}**, the only evaluation so far")
        return found[0]
    choice = st.select_slider(
        "Training step",
        [*map(str, found[:-1]), LATEST],
        value=LATEST,
        format_func=lambda step: f"{found[-1]:,} (latest)" if step == LATEST else f"{int(step):,}",
        key=key,
        bind="query-params",
    )
    return found[-1] if choice == LATEST else int(choice)


def fitting(pending: Sequence[str]) -> None:
    """Say what is being fitted, and draw the page again when it is there."""
    if not pending:
        return
    st.caption(f":material/hourglass_top: Fitting: {plain(', '.join(pending))} …")
    st.session_state["pending"] = True


def _watch_fits() -> None:
    """Draw the page again when a fit has arrived."""
    left = fits.fitter.left()

    @st.fragment(run_every=FITTING_SECONDS)
    def watch() -> None:
        now = fits.fitter.left()
        if now < left or not now:
            st.rerun()

    watch()


def refused(refusals: Mapping[str, str], what: str = "Not fitted") -> None:
    """Say which numbers are not there, and why."""
    if refusals:
        reasons: dict[str, list[str]] = {}
        for who, reason in refusals.items():
            reasons.setdefault(reason, []).append(who)
        lines = [f"- **{plain(', '.join(who))}**: {plain(reason)}" for reason, who in reasons.items()]
        st.info(f"{what}:\n" + "\n".join(lines), icon=":material/block:")


PAGES = "haltscale.pages"
"""Entry points of this group add pages; their values are modules (``my_package.my_page``)."""


def pages(folder: Path) -> list[dict[str, Any]]:
    """The pages of a folder and of other packages, in order. A page is one file; TITLE, ICON and ORDER at its top say
    how it is listed."""
    own = [(path, path.stem) for path in sorted(folder.glob("*.py"))]
    files = [*own, *((path, name) for path, name in _other_pages() if name not in dict(own).values())]
    found = []
    for path, name in files:
        text = path.read_text(encoding="utf-8")
        # Read, not imported: importing a page would run it.
        facts = dict(re.findall(r'^(TITLE|ICON|ORDER) = "?([^"\n]+?)"?$', text, flags=re.MULTILINE))
        purpose = re.match(r'"""(.+?)(?:"""|\n\n)', text, flags=re.DOTALL)
        if "TITLE" in facts:
            found.append(
                {
                    "page": path,
                    "url_path": name,
                    "title": facts["TITLE"],
                    "icon": facts.get("ICON", ":material/article:"),
                    "help": " ".join(purpose[1].split()) if purpose else None,
                    "order": float(facts.get("ORDER", 100)),
                }
            )
    return sorted(found, key=lambda entry: (entry["order"], entry["title"]))


@cache
def _other_pages() -> list[tuple[Path, str]]:
    """File and name of each page of another package; one that is not there is logged and left out."""
    found = []
    for point in sorted(entry_points(group=PAGES)):
        if path := _page_file(point.value):
            found.append((path, point.name))
        else:
            log.warning("page %r is left out: there is no module %s", point.name, point.value)
    return found


def _page_file(module: str) -> Path | None:
    """The file of a page's module, which is not imported; None where there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except ImportError:
        return None
    return Path(spec.origin) if spec and spec.origin else None
