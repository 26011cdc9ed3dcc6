"""Sensitivity of a sweep: heat maps, parallel coordinates, importance, and slices through one option."""

import pandas as pd
import streamlit as st

from haltscale.dashboard import data, fits, layout, style, sweep_figures
from haltscale.dashboard.data import FlopsKind, StudyView, sound
from haltscale.dashboard.sweep_figures import OPTION_NAMES, TARGETS
from haltscale.platform import analysis
from haltscale.platform.analysis import Refusal

TITLE = "Sweeps"
ICON = ":material/tune:"
ORDER = 3


def body(view: StudyView) -> None:
    layout.heading(view, "Sensitivity")
    known = view.runs[view.runs["loss"].notna() & sound(view.runs) & (view.runs["role"] != "tuning")]
    methods = [method for method, part in known.groupby("method", sort=False) if sweep_figures.varying(part)]
    if not methods:
        st.info(
            "No method has two evaluated runs that differ in an option, a size or a seed.",
            icon=":material/hourglass_empty:",
        )
        return
    richest = max(methods, key=lambda method: len(sweep_figures.varying(known[known["method"] == method])))
    method = st.segmented_control(
        "Method",
        methods,
        default=richest,
        required=True,
        key="sweep-method",
        bind="query-params",
        format_func=layout.label,
    )
    runs = known[known["method"] == method]
    names = sweep_figures.varying(runs)
    heat_maps(runs, [name for name in ("lam", "beta", "l_max", "tau") if name in names])
    with st.container(border=True):
        st.header("Every run through its options", anchor=False)
        layout.chart(
            sweep_figures.parallel(runs, FlopsKind.REALISED),
            runs[[*data.TEXT, *data.NUMBERS]],
            key="parallel",
            title=f"{method!s}: runs through their options",
            alt=f"Parallel coordinates of {len(runs)} runs over {', '.join(OPTION_NAMES[n] for n in names)}; the same"
            " numbers are in the table of the page Studies",
        )
        st.caption(
            "Lighter lines have a lower loss; the solid ones are the best sixth. A click in the legend hides a range "
            "of losses. Runs that share a value are set apart a little, the best lowest. "
            f"At most {sweep_figures.MOST_LINES} runs, the best ones."
        )
    left, right = st.columns(2)
    with left, st.container(border=True, height="stretch"):
        importance(runs, sweep_figures.judged(runs))
    with right, st.container(border=True, height="stretch"):
        slices(runs, names)


def heat_maps(runs: pd.DataFrame, names: list[str]) -> None:
    """Perplexity and mean steps side by side over two options."""
    if len(names) < 2:
        told = f"only {OPTION_NAMES[names[0]]} varies" if names else "none of λ, β, l_max and τ varies"
        st.info(f"A heat map needs two options that vary; here {told}.", icon=":material/grid_view:")
        return
    with st.container(border=True):
        st.header("What an option buys, and what it costs in steps", anchor=False)
        sizes = sorted(set(runs["size"]), key=lambda size: (data.size_order(size), size))
        size = sizes[-1]
        if len(sizes) > 1:
            size = st.segmented_control(
                "Size",
                sizes,
                default=sizes[-1],
                required=True,
                key="heat-size",
                bind="query-params",
                format_func=layout.label,
            )
        part = runs[runs["size"] == size]
        longest = part["tokens"].max()
        part = part[part["tokens"] == longest]
        split = names[2] if len(names) > 2 else None
        layout.chart(
            sweep_figures.heat_maps(part, names[0], names[1], split),
            part[["label", *names, "seed", "perplexity", "loss", "mean_steps"]],
            key="heat-maps",
            title="Perplexity and mean latent steps over the options",
            alt=f"Perplexity and mean latent steps over {' and '.join(OPTION_NAMES[n] for n in names[:2])}; lowest"
            f" perplexity {style.three(float(part['perplexity'].min()))}",
        )
        st.caption(
            f"Runs of {layout.plain(size)} over {style.compact(float(longest))} tokens. A cell is the mean over "
            "whatever else varies; lighter is a lower perplexity on the left, more steps on the right. One scale for "
            "all maps of a column."
        )


def importance(runs: pd.DataFrame, names: list[str]) -> None:
    """Which options matter."""
    st.header("Which options matter", anchor=False)
    found, refused = {}, {}
    settled = fits.settled(data.analysed(runs))
    for target in ("loss", "mean_steps"):
        answer = analysis.importance(settled, names, target=target)
        if isinstance(answer, Refusal):
            refused[target.replace("_", " ")] = answer.reason
        else:
            found[target] = answer
    if found:
        layout.chart(
            sweep_figures.importance(found),
            pd.concat([table.assign(target=target) for target, table in found.items()]),
            key="importance",
            title="Share of variance that each option explains alone",
            alt="; ".join(
                f"{target}: "
                + ", ".join(
                    f"{sweep_figures.option_name(r['parameter'])} {100 * r['share']:.0f} %"
                    for r in t.to_dict("records")
                )
                for target, t in found.items()
            ),
        )
        st.caption(
            "A plain variance decomposition: main effects only. Up to the grey tick, chance explains as much; what is "
            "missing to 100 % is interaction and noise."
        )
    layout.refused(refused)


def slices(runs: pd.DataFrame, names: list[str]) -> None:
    """The runs along one option."""
    st.header("Along one option", anchor=False)
    with st.container(horizontal=True):
        name = st.segmented_control(
            "Option", names, default=names[0], required=True, key="slice", bind="query-params",
            format_func=lambda name: OPTION_NAMES[name],
        )  # fmt: skip
        target = st.segmented_control(
            "Result", ["loss", *TARGETS], default="loss", required=True, key="slice-of", bind="query-params",
            format_func=lambda target: target.replace("_", " "),
        )  # fmt: skip
    table = analysis.slices(runs, str(name), target=str(target))
    if isinstance(table, Refusal):
        layout.refused({OPTION_NAMES[str(name)]: table.reason})
        return
    layout.chart(
        sweep_figures.slice_of(runs, table, str(name), str(target)),
        runs[["label", "size", str(name), str(target)]],
        key="slices",
        title=f"{target} along {OPTION_NAMES[str(name)]}",
        alt=f"{target} at {len(table)} values of {OPTION_NAMES[str(name)]}",
    )
    st.caption("A marker per run, a bar at the mean over whatever else varies.")


layout.live(body)
