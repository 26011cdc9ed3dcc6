"""Is the question answered, by how much and how sure? The verdict, the differences behind it, what is missing."""

import pandas as pd
import streamlit as st

from haltscale.dashboard import answer, answer_figures, data, fits, layout, style
from haltscale.dashboard.answer import EQUAL, Answer
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import UNREADABLE, StudyView
from haltscale.platform import analysis
from haltscale.platform.analysis import Estimate, Refusal, Verdict
from haltscale.platform.analysis.matched import SAME
from haltscale.platform.arms import is_control, shown
from haltscale.platform.sweeps import report

TITLE = "Answer"
ICON = ":material/balance:"
ORDER = 0
ICONS = {
    Verdict.LOWER: ":material/check_circle:",
    Verdict.HIGHER: ":material/cancel:",
    Verdict.UNDECIDED: ":material/help:",
}


def body(view: StudyView) -> None:
    layout.heading(view, "Answer", says="Is the study's question answered, by how much, and how sure is that?")
    pair = answer.default_pair(view)
    if pair is None:
        st.info("A comparison needs runs of two methods; the runs shown are of one.", icon=":material/compare_arrows:")
        targets(view)
        return
    names = answer.arms(view)
    choice = st.container(horizontal=True, vertical_alignment="bottom")
    with choice:
        arm = st.selectbox(
            "Method", names, index=names.index(pair[0]), key="arm", bind="query-params", width=220, format_func=shown
        )
        others = [name for name in names if name != arm]
        reference = st.selectbox(
            "Compared with",
            others,
            index=others.index(pair[1]) if pair[1] in others else 0,
            key="against",
            bind="query-params",
            width=220,
            format_func=shown,
        )
        x = st.selectbox(
            "At equal",
            list(EQUAL),
            index=list(EQUAL).index(answer.default_equal(view, str(arm), str(reference))),
            key="equal",
            bind="query-params",
            width=240,
            format_func=EQUAL.__getitem__,
        )
    found = read(view, str(arm), str(reference), str(x))
    verdict(view, found)
    targets(view)
    replays(view, str(arm))
    others_too(view, str(reference), str(x))
    layout.honest(view)


def read(view: StudyView, arm: str, reference: str, x: str) -> Answer:
    """The comparison, with the documents and the evaluations that it needs."""
    runs = answer.comparable(view)
    runs = runs[runs["method"].isin([arm, reference])]
    shelf = store()
    unfinished = runs[~runs["state"].isin(["finished", "planned", "damaged", "diverged"])]
    evaluations = {}
    if len(unfinished):
        same = runs[runs["size"].isin(unfinished["size"]) & runs["seed"].isin(unfinished["seed"])]
        evaluations = {str(key): data.evaluations(shelf, view.name, str(key)) for key in same["key"]}
    return answer.answer(
        view,
        arm,
        reference,
        x,
        noise=fits.seed_noise(fits.settled(data.analysed(answer.comparable(view)))),
        documents=fits.documents(view.name, runs),
        evaluations=evaluations,
    )


def verdict(view: StudyView, found: Answer) -> None:
    """The sentence, the figure behind it, and what may still change it."""
    comparison = found.comparison
    with st.container(border=True):
        st.header(f"{ICONS[comparison.verdict]} {layout.plain(answer.headline(found))}", anchor=False)
        if text := answer.support(found):
            st.markdown(layout.plain(text))
        lines = answer.missing(view, found)
        if lines:
            st.markdown("\n".join(f"- {layout.plain(line)}" for line in lines))
        rows = answer_figures.forest_rows(comparison, shown(found.arm), found.provisional)
        if rows.empty:
            return
        layout.chart(
            answer_figures.forest(rows, shown(found.arm), shown(found.reference)),
            comparison.points if len(comparison.points) else rows,
            key=f"forest-{comparison.x}",
            title=f"{view.name}: loss of {found.arm} minus {found.reference} at equal {EQUAL[comparison.x]}",
            alt=f"{answer.headline(found)} "
            + "; ".join(f"{row['name']}: {style.signed(row['difference'])}" for row in rows.to_dict("records")[:12]),
        )
        known = [basis for basis in comparison.cells["basis"] if basis != analysis.Basis.NONE]
        bases = ", ".join(dict.fromkeys(map(str, known)))
        st.caption(
            f"A row per size and budget; 95 % intervals{f' over {bases}' if bases else ''}. Two runs are a point where "
            f"size and seed are the same and {EQUAL[comparison.x]} differ by at most "
            f"{100 * (SAME - 1):.0f} %. A difference whose interval "
            "includes 0 is not decided."
        )


def targets(view: StudyView) -> None:
    """What the study set out to show or to reproduce, and whether it did."""
    if not view.document.get("targets"):
        return
    rows = answer.claims(view, fits.documents(view.name, answer.comparable(view)))
    if rows.empty:
        return
    st.header("Targets of the study", anchor=False)
    layout.table(
        rows,
        key="claims",
        alt=f"{len(rows)} targets, of which {int((rows['verdict'] == 'holds').sum())} hold",
        column_config={
            "claim": st.column_config.TextColumn("Target", pinned=True),
            "verdict": st.column_config.TextColumn("Verdict"),
            "figure": st.column_config.TextColumn("Figure"),
            "reason": st.column_config.TextColumn("Because", width="large"),
            "source": st.column_config.TextColumn("Source"),
        },
        column_order=["claim", "verdict", "figure", "reason", "source"],
    )


def replays(view: StudyView, arm: str) -> None:
    """Whether the router's choice of tokens matters: the arm against its replay controls."""
    if not any(is_control(name) for name in answer.arms(view)):
        return
    try:
        pairs = report.control_differences(store(), view.name)
    except UNREADABLE as error:
        st.warning(layout.plain(error), icon=":material/broken_image:")
        return
    if pairs.empty:
        return
    pairs = pairs[~pairs["control"].str.contains("old control") & pairs["control"].isin(["shuffled", "fixed"])]
    if pairs.empty:
        return
    st.header("Does it matter which tokens get the steps?", anchor=False)
    for row in pairs.to_dict("records"):
        if row["problem"]:
            text = f"not decided: {row['problem']}"
        else:
            value = Estimate(value=row["difference"], low=row["low"], high=row["high"])
            better = "better than" if value.low > 0 else "worse than" if value.high < 0 else "not told apart from"
            text = f"**{better}** its steps {DEALT[row['control']]}: {answer.difference(value)} nats/token"
        st.markdown(f"- {layout.plain(row['subject'])}: {text} ({row['seeds']} seeds, {row['documents']:,} documents)")
    st.caption(
        "A replay control takes its subject's numbers of steps at other tokens or spread evenly, trained in all else "
        "alike. Differences are control minus subject, paired by held-out document and seed."
    )


DEALT = {"shuffled": "at other tokens (shuffled)", "fixed": "spread evenly (fixed)"}


def others_too(view: StudyView, reference: str, x: str) -> None:
    """Every arm against the same reference."""
    names = [name for name in answer.arms(view) if name != reference]
    if len(names) < 2:
        return
    noise = fits.seed_noise(fits.settled(data.analysed(answer.comparable(view))))
    found = {shown(name): answer.answer(view, name, reference, x, noise=noise).comparison for name in names}
    st.header(f"Every method against {layout.plain(shown(reference))}", anchor=False)
    decided = {name: one for name, one in found.items() if isinstance(one.overall, Estimate)}
    if decided:
        layout.chart(
            answer_figures.every_arm(decided, shown(reference)),
            pd.concat([one.points.assign(method=name) for name, one in decided.items()]),
            key=f"every-arm-{x}",
            title=f"{view.name}: every method against {reference} at equal {EQUAL[x]}",
            alt="; ".join(
                f"{name}: {answer.difference(one.overall)}"
                for name, one in decided.items()
                if isinstance(one.overall, Estimate)
            ),
        )
        st.caption(
            "Means over matched points with 95 % intervals, one setting of each method: the one that the study names, "
            "else the one that ran at most points; never the best."
        )
    layout.refused(
        {name: one.overall.reason for name, one in found.items() if isinstance(one.overall, Refusal)}, "Not decided"
    )


layout.live(body)
