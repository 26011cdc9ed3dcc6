"""Loss against training compute: fits with bands, frontier, isoFLOP profiles, and what a latent step is worth."""

import math

import pandas as pd
import streamlit as st

from haltscale.dashboard import data, fits, law_figures, layout, style
from haltscale.dashboard.data import FlopsKind, StudyView, plotted
from haltscale.dashboard.law_figures import Measure
from haltscale.platform import analysis, arms
from haltscale.platform.analysis import Estimate, Refusal

TITLE = "Scaling"
ICON = ":material/insights:"
ORDER = 2
VIEWS = ("Compute", "IsoFLOP", "Multipliers", "Value of a latent step", "Size and data")


def body(view: StudyView) -> None:
    layout.heading(view, "Loss against training compute")
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
    if part == "Compute":
        summary(view, kind)
        compute(view, runs, kind)
    elif part == "IsoFLOP":
        isoflop(runs, kind)
    elif part == "Multipliers":
        multipliers(runs, kind)
    elif part == "Value of a latent step":
        worth(runs)
    else:
        surface(runs)
    layout.honest(view)


def summary(view: StudyView, kind: FlopsKind) -> None:
    """The study in four numbers."""
    runs = view.runs
    shown = plotted(runs, kind)
    finished = shown[shown["state"] == "finished"]
    thinking = finished[finished["l_max"].gt(0)]
    with st.grid(4):
        st.metric(
            "Runs finished", f"{int((runs['state'] == 'finished').sum())} of {len(runs)}", border=True, height="stretch"
        )
        best = data.best(finished)
        st.metric(
            "Lowest loss, nats/token",
            style.three(best["loss"]) if best is not None else "–",
            border=True,
            height="stretch",
            help=f"of {layout.plain(best['label'])}: perplexity {style.three(best['perplexity'])}"
            if best is not None
            else None,
        )
        steps = (
            f"{style.three(thinking['mean_steps'].mean())} of {thinking['l_max'].max():.0f}" if len(thinking) else "–"
        )
        st.metric(
            "Latent steps per token",
            steps,
            border=True,
            height="stretch",
            help="Mean over the finished runs that may think, of the most they may take.",
        )
        st.metric(
            f"Training FLOPs, {kind}",
            style.scientific(float(shown[f"flops_{kind}"].sum())) if len(shown) else "–",
            border=True,
            height="stretch",
            help="Sum over all runs so far.",
        )


def compute(view: StudyView, runs: pd.DataFrame, kind: FlopsKind) -> None:
    """The page's figure: every run, the laws, the frontier."""
    shown = plotted(view.runs, kind)
    if shown.empty:
        st.info(
            "No run has been evaluated yet. The first points appear here as hollow markers at the first evaluation.",
            icon=":material/hourglass_empty:",
        )
        return
    x = f"flops_{kind}"
    laws, refused = fits.power_laws(runs, x)
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            measure = Measure(
                st.segmented_control(
                    "Measure",
                    [one.value for one in Measure],
                    default=Measure.LOSS.value,
                    required=True,
                    key="measure",
                    bind="query-params",
                    label_visibility="collapsed",
                )
            )
            draw_laws = st.toggle("Fits with bands", value=True, key="fits", bind="query-params", disabled=not laws)
            draw_frontier = st.toggle("Pareto frontier", value=True, key="frontier", bind="query-params")
        figure = law_figures.scaling(
            view.runs,
            kind,
            measure=measure,
            laws=laws if draw_laws else None,
            frontier=analysis.pareto(runs, x) if draw_frontier else None,
        )
        best = shown.sort_values("loss").iloc[0]
        layout.chart(
            figure,
            shown[[*data.TEXT, *data.NUMBERS]],
            key=f"scaling-{kind}",
            title=f"{view.name}: {measure.axis} against {kind} training FLOPs",
            alt=f"{measure.axis} against {kind} training FLOPs of {len(shown)} runs; lowest loss"
            f" {style.three(best['loss'])} for {best['label']}",
        )
        st.caption(
            "A marker per run (hollow: no result yet, at its last evaluation), a line per method and options through "
            "the sizes; bars are one standard error over the validation tokens. The grey staircase is what no run "
            "beats. Lower and further left is better."
            + (" Bands hold the law with 95 %; dotted is extrapolated." if laws else "")
        )
    layout.refused(refused)
    if laws:
        parameters(laws)
        extrapolation(runs, x)
    noise(runs)


def parameters(laws: dict[str, analysis.LawFit]) -> None:
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


def told(one: Estimate) -> str:
    """A number with its interval, or why there is none."""
    if not one.identifiable:
        return one.problem
    low, high = ("∞" if end == math.inf else style.three(end) for end in (one.low, one.high))
    return f"{style.three(one.value)} [{low}, {high}]"


def extrapolation(runs: pd.DataFrame, x: str) -> None:
    """Whether the laws predict what they have not seen."""
    found, refused = fits.held_out(runs, x)
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
                "Each budget is predicted from all the others; stars are predicted from smaller budgets only. Mean "
                "absolute error: "
                + ", ".join(f"{layout.plain(m)} {style.three(100 * one.error)} %" for m, one in found.items())
            )
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


def isoflop(runs: pd.DataFrame, kind: FlopsKind) -> None:
    """Loss against parameters at each budget."""
    if runs.empty:
        nothing()
        return
    method = st.segmented_control(
        "Method", list(dict.fromkeys(runs["method"])), default=runs["method"].iloc[0], required=True, key="iso-method",
        bind="query-params", format_func=layout.label,
    )  # fmt: skip
    found = fits.isoflop(runs[runs["method"] == method], f"flops_{kind}")
    if isinstance(found, Refusal):
        layout.refused({str(method): found.reason})
        return
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
            "Parabolas of the log loss in the log parameters; a star is a budget's best size with its 95 % interval. "
            + (
                f"The best size grows with C^{told(growth)}."
                if isinstance(growth, Estimate)
                else f"No exponent: {layout.plain(growth.reason)}."
            )
        )
    layout.refused({f"{style.scientific(p.budget)} FLOPs": p.problem for p in found.profiles if p.problem})
    surfaces, _ = fits.surfaces(runs[runs["method"] == method])
    for law in surfaces.values():
        if warning := analysis.disagreement(found, law):
            st.warning(layout.plain(warning), icon=":material/warning:")


def multipliers(runs: pd.DataFrame, kind: FlopsKind) -> None:
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
        laws, refused = fits.power_laws(runs, x)
        found = {}
        for method, law in laws.items():
            if method != reference and reference in laws:
                answer = analysis.equivalent(law, laws[reference])
                if isinstance(answer, Refusal):
                    refused[method] = answer.reason
                else:
                    found[method] = answer
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
                    f"How many times as much {layout.plain(reference)} needs for the same loss, where runs of both"
                    " reach it; above 1 the method is the cheaper one. Geometric means: "
                    + ", ".join(f"{layout.plain(m)} {layout.plain(told(one.mean))}" for m, one in found.items())
                )
        layout.refused(refused)


def worth(runs: pd.DataFrame) -> None:
    """phi: what a further pass is worth, in new parameters."""
    st.markdown(
        r"$L = E + A\,(N_\text{once} + r^{\varphi} N_\text{rec})^{-a} + B\,D^{-b}$, "
        "one law over all methods, φ for each: **1** where a further "
        "pass of the stack is worth as many new parameters, **0** where it is worth nothing."
    )
    found = fits.recurrence(runs)
    if isinstance(found, Refusal):
        layout.refused({"φ": found.reason})
        return
    with st.container(border=True):
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
        if found.note:
            st.caption(layout.plain(found.note.capitalize() + "."))
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


def surface(runs: pd.DataFrame) -> None:
    """L(N, D): the surface, observed against fitted."""
    laws, refused = fits.surfaces(runs)
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
            st.caption("Left: a run on the dashed line is fitted exactly. Right: residuals should show no trend.")
    layout.refused(refused)


def nothing() -> None:
    st.info("No run has a result yet.", icon=":material/hourglass_empty:")


layout.live(body)
