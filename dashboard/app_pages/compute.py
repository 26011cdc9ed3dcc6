"""What does compute buy? Loss against FLOPs, tokens or time; best sizes; multipliers; what a latent step is worth."""

import math

import pandas as pd
import streamlit as st

from haltscale.dashboard import answer, data, fits, law_figures, layout, outside, several, style
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import FlopsKind, StudyView, plotted
from haltscale.dashboard.law_figures import Axis, Join, Measure
from haltscale.platform import analysis, arms
from haltscale.platform.analysis import Estimate, Refusal

TITLE = "Compute"
ICON = ":material/insights:"
ORDER = 1
VIEWS = ("Loss", "IsoFLOP", "Multipliers", "Value of a latent step", "Size and data")
MOST_STUDIES = 3
UNFINISHED = ["running", "planned", "stalled", "stopped", "failed", "capped"]


def body(view: StudyView) -> None:
    view = data.compared(view)
    layout.heading(view, "Loss against training compute", says="What does each method reach for its compute?")
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    with left:
        part = st.segmented_control(
            "Show",
            VIEWS,
            default=VIEWS[0],
            required=True,
            key="view",
            bind="query-params",
            label_visibility="collapsed",
        )
    with right, st.container(horizontal=True, horizontal_alignment="right"):
        kind = layout.flops_kind()
    runs = fits.settled(data.analysed(view.runs))
    if part == "Loss":
        compute(view, runs, kind)
    elif part == "IsoFLOP":
        isoflop(view, runs, kind)
    elif part == "Multipliers":
        multipliers(view, runs, kind)
    elif part == "Value of a latent step":
        worth(view, runs)
    else:
        surface(view, runs)
    unfinished(view)
    layout.honest(view)


def provisional(view: StudyView) -> str:
    """What stands before the caption of every fit of an unfinished grid: it may still change."""
    count = int(view.runs["state"].isin(UNFINISHED).sum())
    return f"**Provisional: {count} of {len(view.runs)} runs are not finished.** " if count else ""


def unfinished(view: StudyView) -> None:
    """Say that lines may still change."""
    if text := provisional(view):
        st.caption(f":material/hourglass_top: {text}")


def highlighted(view: StudyView) -> list[str] | None:
    """The series to draw in colour: those of the methods that the reader chose, by default of the comparison that the
    study names. None: all of them."""
    methods = data.in_order(view.runs["method"])
    if len(methods) <= 2:
        return None
    pair = answer.default_pair(view)
    first = [*pair, *arms.controls_of(pair[0], methods)] if pair else methods[:2]
    chosen = st.pills(
        "Highlight", methods, selection_mode="multi", default=first, key="highlight", bind="query-params",
        format_func=layout.label, help="The others are drawn grey. Choose none to see all in colour.",
    )  # fmt: skip
    return answer.series_of(view, [str(one) for one in chosen]) if chosen else None


def compute(view: StudyView, runs: pd.DataFrame, kind: FlopsKind) -> None:
    """The page's figure: every run, means over seeds, and on request the laws."""
    shown = plotted(view.runs, kind)
    if shown.empty:
        st.info(
            "No run has been evaluated yet. The first points appear here as hollow markers at the first evaluation.",
            icon=":material/hourglass_empty:",
        )
        return
    flops = f"flops_{kind}"
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="bottom"):
            choices = [one.value for one in Axis if shown[one.column(kind)].gt(0).any()]
            axis = Axis(
                st.selectbox("Horizontal axis", choices, key="axis", bind="query-params", width=240) or Axis.FLOPS
            )
            joins = [one.value for one in Join]
            join = Join(
                st.selectbox(
                    "Lines", joins, index=joins.index(law_figures.default_join(shown)), key="join",
                    bind="query-params", width=240,
                )
            )  # fmt: skip
            measure = Measure(
                st.segmented_control(
                    "Measure",
                    [one.value for one in Measure],
                    default=Measure.LOSS.value,
                    required=True,
                    key="measure",
                    bind="query-params",
                )
            )
            on_flops = axis is Axis.FLOPS
            draw_laws = st.toggle("Fitted laws", key="fits", bind="query-params", disabled=not on_flops)
            draw_frontier = st.toggle("Pareto frontier", key="frontier", bind="query-params", disabled=not on_flops)
        focus = highlighted(view)
        laws: dict[str, analysis.LawFit] = {}
        refused: dict[str, str] = {}
        place = st.container()
        if draw_laws and on_flops:
            fitted = fits.power_laws(runs, flops)
            laws, refused = fitted.found, fitted.refused
            layout.fitting(fitted.pending)
        points = overlay()
        with place:
            layout.chart(
                law_figures.scaling(
                    view.runs,
                    kind,
                    axis=axis,
                    measure=measure,
                    join=join,
                    focus=focus,
                    laws=laws or None,
                    frontier=analysis.pareto(runs, flops) if draw_frontier and on_flops else None,
                    outside=points,
                ),
                shown[[*data.TEXT, *data.NUMBERS]],
                key=f"scaling-{kind}-{axis.column(kind)}",
                title=f"{view.name}: {measure.axis} against {axis.named(kind)}",
                alt=f"{measure.axis} against {axis.named(kind)} of {len(shown)} runs; lowest loss {lowest(shown)}",
            )
            st.caption(
                "A marker per run (hollow: no result yet, at its last evaluation), lines through the means over seeds; "
                "bars are one standard error over the validation tokens. Lower and further left is better."
                + (f" {provisional(view)}Bands hold the law with 95 %; dotted is extrapolated." if laws else "")
                + (" The grey staircase is what no run beats." if draw_frontier and on_flops else "")
            )
    layout.refused(refused)
    if laws:
        parameters(view, laws)
        extrapolation(view, runs[runs["method"].isin(list(laws))], flops)
    noise(runs)
    together(view, kind, axis, measure, join)


def lowest(shown: pd.DataFrame) -> str:
    """The best run, in words."""
    best = shown.sort_values("loss").iloc[0]
    return f"{style.three(best['loss'])} for {best['label']}"


def overlay() -> pd.DataFrame | None:
    """Points from elsewhere, from a file of the reader's."""
    if layout.is_collecting():
        return None
    with st.expander("Results from elsewhere", icon=":material/add_chart:"):
        st.caption(
            "A CSV file with the columns label, flops (training FLOPs, counted as above), loss (nats/token) and "
            "source. Its points are drawn hollow and enter no fit. The file stays in this browser session."
        )
        file = st.file_uploader("CSV file", type="csv", key="outside", label_visibility="collapsed")
        if file is None:
            return None
        try:
            return outside.read(file.getvalue())
        except outside.OutsideError as error:
            st.error(layout.plain(error), icon=":material/error:")
            return None


def together(view: StudyView, kind: FlopsKind, axis: Axis, measure: Measure, join: Join) -> None:
    """Other studies in one figure with this one, and a comparison across them, where their corpora agree."""
    names = [name for name in store().studies() if name != view.name]
    if not names:
        return
    st.header("With other studies", anchor=False)
    chosen = st.multiselect(
        "Other studies",
        names,
        key="studies",
        bind="query-params",
        max_selections=MOST_STUDIES,
        placeholder="None",
        help="Studies of the same corpus share a figure and can be compared. The filters of the sidebar hold for all.",
    )
    if not chosen:
        return
    kept, refused = several.agreeing(view, [layout.filtered(store().view(name)) for name in chosen])
    layout.refused(refused, "Not compared")
    if len(kept) < 2:
        return
    runs = several.joined(kept)
    shown = plotted(runs, kind)
    if shown.empty:
        nothing()
        return
    with st.container(border=True):
        layout.chart(
            law_figures.together(runs, kind, axis=axis, measure=measure, join=join),
            shown[["study", *data.TEXT, *data.NUMBERS]],
            key=f"together-{kind}-{axis.column(kind)}",
            title=f"{', '.join(one.name for one in kept)}: {measure.axis} against {axis.named(kind)}",
            alt=f"{measure.axis} against {axis.named(kind)} of {len(shown)} runs of {len(kept)} studies; lowest loss "
            f"{lowest(shown)}",
        )
        st.caption(
            "Colour says the method; marker and dash, the study. The studies have one corpus and tokenizer (the "
            "fingerprints agree), so their losses compare."
        )
    across({one.name: one for one in kept}, view.name)


def across(views: dict[str, StudyView], first: str) -> None:
    """An arm of one study against an arm of another, at equal compute or tokens."""
    sides = [(name, arm) for name, one in views.items() for arm in answer.arms(one)]
    names = {f"{arm} · {study}": (study, arm) for study, arm in sides}
    own = [name for name, (study, _) in names.items() if study == first]
    pair = answer.default_pair(views[first])
    start = own.index(f"{pair[0]} · {first}") if pair else 0
    with st.container(horizontal=True, vertical_alignment="bottom"):
        one = st.selectbox("Arm", own, index=start, key="across-arm", bind="query-params", width=300)
        others = [name for name, (study, _) in names.items() if study != first]
        arm = names[str(one)][1]
        same = next((place for place, name in enumerate(others) if names[name][1] == arm), 0)
        other = st.selectbox("Compared with", others, index=same, key="across-with", bind="query-params", width=300)
        x = st.selectbox(
            "At equal", list(answer.EQUAL), key="across-equal", bind="query-params", width=240,
            format_func=answer.EQUAL.__getitem__,
        )  # fmt: skip
    found = several.across(views, names[str(one)], names[str(other)], str(x))
    st.markdown(f"**{layout.plain(answer.headline(found))}**")
    if text := answer.support(found):
        st.markdown(layout.plain(text))


def parameters(view: StudyView, laws: dict[str, analysis.LawFit]) -> None:
    """The laws in numbers."""
    st.header(r"$L(C) = E + A\,C^{-\alpha}$", anchor=False)
    rows = [
        {
            "method": method,
            **{name: told(one) for name, one in law.estimates.items()},
            "runs": len(law.runs),
            "left out": law.left_out or "none",
            "starts": f"{law.starts}, spread {style.three(law.spread)}",
        }
        for method, law in laws.items()
    ]
    layout.table(pd.DataFrame(rows), key="law-table", alt="Parameters of the fitted laws with their 95 % intervals")
    if text := provisional(view):
        st.caption(text)


def told(one: Estimate) -> str:
    """A number with its interval, or why there is none."""
    if not one.identifiable:
        return one.problem
    low, high = ("∞" if end == math.inf else style.three(end) for end in (one.low, one.high))
    return f"{style.three(one.value)} [{low}, {high}]"


def extrapolation(view: StudyView, runs: pd.DataFrame, x: str) -> None:
    """Whether the laws predict what they have not seen."""
    predicted = fits.held_out(runs, x)
    found, refused = predicted.found, predicted.refused
    st.header("Does the law predict a budget that it has not seen?", anchor=False)
    if found:
        with st.container(border=True):
            behind = pd.concat([one.budgets.assign(method=method) for method, one in found.items()])
            layout.chart(
                law_figures.held_out(found),
                behind,
                key="held-out",
                title="Error of predicting a held-out budget",
                alt="; ".join(f"{m}: mean error {style.three(100 * one.error)} %" for m, one in found.items()),
            )
            st.caption(
                provisional(view)
                + "Each budget is predicted from all the others; stars are predicted from smaller budgets only. Mean "
                "absolute error: "
                + ", ".join(f"{layout.plain(m)} {style.three(100 * one.error)} %" for m, one in found.items())
            )
    layout.fitting(predicted.pending)
    layout.refused(refused)


def noise(runs: pd.DataFrame) -> None:
    """What a difference of two losses has to be compared with."""
    found = analysis.seed_noise(runs)
    text = (
        f"**Seed noise**: unknown. {layout.plain(found.reason.capitalize())}."
        if isinstance(found, Refusal)
        else f"**Seed noise**: {told(found.deviation)} nats/token between seeds ({found.groups} configurations,"
        f" {found.runs} runs). A difference of two losses below about three times this says nothing."
    )
    st.caption(f":material/casino: {text}")


def isoflop(view: StudyView, runs: pd.DataFrame, kind: FlopsKind) -> None:
    """Loss against parameters at each budget: the points of every method, and on request the fit of one."""
    if runs.empty:
        nothing()
        return
    methods = data.in_order(view.runs["method"])
    finished = view.runs[view.runs["state"] == "finished"]
    sizes = finished.groupby("nominal")["size"].nunique()
    if not sizes.gt(1).any():
        layout.refused({"IsoFLOP": "no budget of compute has 2 model sizes: train several sizes to the same FLOPs"})
        return
    with st.container(border=True):
        layout.chart(
            law_figures.isoflop_points(view.runs, methods),
            finished[["label", "method", "size", "nominal", "parameters", "loss", "seed"]],
            key="isoflop-points",
            title=f"{view.name}: loss against parameters at each budget",
            alt="; ".join(
                f"{style.power(float(str(budget)))} FLOPs: {count} sizes"
                for budget, count in sizes[sizes.gt(1)].items()
            ),
        )
        st.caption(
            "A panel per method on shared axes, a line per nominal budget (realised FLOPs) through the means over "
            "seeds. A star marks the best size of a budget where it lies between two others."
        )
    st.header("Best size and how it grows", anchor=False)
    method = st.segmented_control(
        "Method", methods, default=(answer.default_pair(view) or methods)[0], required=True, key="iso-method",
        bind="query-params",
        format_func=layout.label,
    )  # fmt: skip
    found = fits.isoflop(runs[runs["method"] == method], f"flops_{kind}")
    if isinstance(found, fits.Pending):
        layout.fitting([str(method)])
        return
    if isinstance(found, Refusal):
        layout.refused({str(method): found.reason})
        return
    if len(found.minima):
        with st.container(border=True):
            layout.chart(
                law_figures.isoflop(found, kind),
                pd.concat([profile.runs.assign(budget=profile.budget) for profile in found.profiles]),
                key="isoflop",
                title=f"IsoFLOP profiles of {method}, {kind} FLOPs",
                alt=f"Loss against parameters at {len(found.profiles)} budgets; {len(found.minima)} have a minimum",
            )
            growth = found.exponent
            st.caption(
                provisional(view)
                + "Parabolas of the log loss in the log parameters; a star is a budget's best size with its 95 % "
                "interval. "
                + (
                    f"The best size grows with C^{told(growth)}."
                    if isinstance(growth, Estimate)
                    else f"No exponent: {layout.plain(growth.reason)}."
                )
            )
        with st.container(border=True):
            layout.chart(
                law_figures.best_size(found),
                law_figures.optima(found),
                key="best-size",
                title=f"Best size and tokens of {method} by budget",
                alt="; ".join(
                    f"{style.power(row['budget'])} FLOPs: {style.compact(row['parameters'])} parameters"
                    for row in found.minima.to_dict("records")
                ),
            )
            st.caption(
                provisional(view)
                + "Best size (left) and the tokens that it leaves (right) at the budgets with a minimum."
            )
    layout.refused({f"{style.power(float(f'{p.budget:.2g}'))} FLOPs": p.problem for p in found.profiles if p.problem})
    surfaces = fits.surfaces(runs[runs["method"] == method])
    layout.fitting(surfaces.pending)
    for law in surfaces.found.values():
        if warning := analysis.disagreement(found, law):
            st.warning(layout.plain(warning), icon=":material/warning:")


def multipliers(view: StudyView, runs: pd.DataFrame, kind: FlopsKind) -> None:
    """What one method is worth in another's compute, and in its parameters."""
    methods = list(dict.fromkeys(runs["method"]))
    if len(methods) < 2:
        st.info("A multiplier compares two methods; the runs shown are of one.", icon=":material/compare_arrows:")
        return
    reference = st.segmented_control(
        "Compared with",
        methods,
        default="vanilla" if "vanilla" in methods else methods[0],
        required=True,
        key="reference",
        bind="query-params",
        format_func=layout.label,
    )
    for x, title in ((f"flops_{kind}", f"Equivalent compute ({kind} FLOPs)"), ("parameters", "Equivalent parameters")):
        st.header(title, anchor=False)
        fitted = fits.power_laws(runs, x)
        laws, refused = fitted.found, fitted.refused
        layout.fitting(fitted.pending)
        found = {}
        for method, law in laws.items():
            if method != reference and reference in laws:
                value = analysis.equivalent(law, laws[reference])
                if isinstance(value, Refusal):
                    refused[method] = value.reason
                elif not (value.mean.low > 0 and value.mean.high < math.inf):
                    refused[method] = "not identifiable: the interval of its multiplier has no end"
                else:
                    found[method] = value
        if found:
            with st.container(border=True):
                layout.chart(
                    law_figures.multipliers(found, str(reference)),
                    pd.concat([one.table.assign(method=method) for method, one in found.items()]),
                    key=f"multipliers-{x}",
                    title=f"{title}: what {reference} needs for the same loss",
                    alt="; ".join(f"{method}: {told(one.mean)} times" for method, one in found.items()),
                )
                st.caption(
                    provisional(view)
                    + f"How many times as much {layout.plain(reference)} needs for the same loss, where runs of both"
                    " reach it; above 1 the method is the cheaper one. Geometric means: "
                    + ", ".join(f"{layout.plain(m)} {layout.plain(told(one.mean))}" for m, one in found.items())
                )
        layout.refused(refused)


def worth(view: StudyView, runs: pd.DataFrame) -> None:
    """phi: what a further pass is worth, in new parameters."""
    st.markdown(
        r"$L = E + A\,(N_\text{once} + r^{\varphi} N_\text{rec})^{-a} + B\,D^{-b}$, "
        "one law over all methods, φ for each: **1** where a further "
        "pass of the stack is worth as many new parameters, **0** where it is worth nothing."
    )
    found = fits.recurrence(runs)
    if isinstance(found, fits.Pending):
        layout.fitting(["φ"])
        return
    if isinstance(found, Refusal):
        layout.refused({"φ": found.reason})
        return
    if any(one.identifiable for one in found.phi.values()):
        table = pd.DataFrame(
            [{"method": m, "phi": one.value, "low": one.low, "high": one.high, "problem": one.problem}
             for m, one in found.phi.items()]
        )  # fmt: skip
        layout.chart(
            law_figures.intervals(found.phi, "φ", {0.0: "worth nothing", 1.0: "worth a new block"}),
            table,
            key="phi",
            title="What a pass is worth",
            alt="; ".join(f"{method}: {told(one)}" for method, one in found.phi.items()),
        )
        if text := provisional(view) + (layout.plain(found.note.capitalize() + ".") if found.note else ""):
            st.caption(text)
    layout.refused({method: one.problem for method, one in found.phi.items() if one.problem})
    rows = [
        {"method": method, "control": control, "φ minus the control's": told(found.advantage(method, control))}
        for method in found.phi
        for control in arms.controls_of(method, found.phi)
    ]
    if rows:
        st.header("Does the router beat its controls?", anchor=False)
        layout.table(pd.DataFrame(rows), key="advantage", alt="Difference of phi between methods and their controls")
    else:
        st.caption(
            "Replay controls of a method, such as *adaptive/shuffled*, would show here whether its router beats the "
            "same steps taken elsewhere."
        )
    if old := [arms.shown(name) for name in found.phi if name in arms.OLD_CONTROLS]:
        st.caption(f"{', '.join(old)}: these differ from a router in more than where the steps are; no verdict.")


def surface(view: StudyView, runs: pd.DataFrame) -> None:
    """L(N, D): the surface, observed against fitted."""
    fitted = fits.surfaces(runs)
    laws, refused = fitted.found, fitted.refused
    layout.fitting(fitted.pending)
    if laws:
        rows = [
            {"method": method, **{name: told(one) for name, one in law.estimates.items()}}
            | {"N_opt grows with C^": told(analysis.optimal_exponent(law)), "runs": len(law.runs)}
            for method, law in laws.items()
        ]
        layout.table(pd.DataFrame(rows), key="surface-table", alt="Parameters of L(N, D) with their 95 % intervals")
        with st.container(border=True):
            layout.chart(
                law_figures.predicted(laws),
                pd.concat([law.runs.assign(residual=law.residuals) for law in laws.values()]),
                key="surface",
                title="L(N, D): observed against fitted loss",
                alt="Observed against fitted loss, and residuals against parameters",
            )
            st.caption(
                provisional(view)
                + "Left: a run on the dashed line is fitted exactly. Right: residuals should show no trend."
            )
    layout.refused(refused)


def nothing() -> None:
    st.info("No run has a result yet.", icon=":material/hourglass_empty:")


layout.live(body)
