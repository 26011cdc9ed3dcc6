"""Which options matter, and which values should be used? Heat maps with their noise, slices, importance, a verdict."""

import pandas as pd
import streamlit as st

from haltscale.dashboard import answer, data, fits, layout, style, sweep_figures
from haltscale.dashboard.data import FlopsKind, StudyView, sound
from haltscale.dashboard.sweep_figures import OPTION_NAMES, TARGETS
from haltscale.platform import analysis
from haltscale.platform.analysis import Refusal

TITLE = "Sensitivity"
ICON = ":material/tune:"
ORDER = 2
POINT = ("size", "planned_tokens", "planned_flops")


def body(view: StudyView) -> None:
    layout.heading(view, "Sensitivity", says="Which options matter, and which values should be used?")
    known = answer.comparable(view)
    known = known[known["loss"].notna() & sound(known)]
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
    every = known[known["method"] == method]
    runs = point(every)
    names = [name for name in sweep_figures.varying(runs) if name not in ("size", "seed")]
    noise = fits.seed_noise(fits.settled(data.analysed(known)))
    recommendation(runs, names, noise)
    heat_maps(runs, [name for name in ("lam", "beta", "l_max", "tau") if name in names], noise)
    left, right = st.columns(2)
    with left, st.container(border=True, height="stretch"):
        importance(runs, [name for name in sweep_figures.judged(runs) if name not in POINT])
    with right, st.container(border=True, height="stretch"):
        slices(runs, [*names, *(["seed"] if runs["seed"].nunique() > 1 else [])], noise)
    with st.container(border=True):
        st.header("Every run through its options", anchor=False)
        layout.chart(
            sweep_figures.parallel(every, FlopsKind.REALISED),
            every[[*data.TEXT, *data.NUMBERS]],
            key="parallel",
            title=f"{method!s}: runs through their options",
            alt=f"Parallel coordinates of {len(every)} runs over "
            f"{', '.join(OPTION_NAMES[name] for name in sweep_figures.varying(every))}; the same numbers are in the "
            "table of the page Studies",
        )
        st.caption(
            "Runs of all sizes and budgets. Lighter lines have a lower loss; the solid ones are the best sixth. A "
            "click in the legend hides a range of losses. Runs that share a value are set apart a little, the best "
            f"lowest. At most {sweep_figures.MOST_LINES} runs, the best ones."
        )


def point(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of one size and one budget (of compute where the study plans compute, else of tokens), the reader's
    choice: options are compared where all else is equal. It opens where most settings were run."""
    planned = "nominal" if runs["budget"].gt(0).any() else "tokens"
    places = runs.assign(setting=sweep_figures.setting_cells(runs)).groupby(["size", planned], dropna=False)["setting"]
    counts = places.nunique().sort_values(ascending=False, kind="stable")
    names = {}
    for size, value in counts.index:
        known = pd.notna(value) and value > 0
        amount = style.power(value) + " FLOPs" if planned == "nominal" else style.compact(value) + " tokens"
        names[f"{size} · {data.budget_name(value)}"] = (size, value, f"{size} at {amount if known else 'any budget'}")
    chosen = next(iter(names))
    if len(names) > 1:
        chosen = str(
            st.selectbox(
                "Size and budget",
                list(names),
                key="point",
                bind="query-params",
                width=320,
                format_func=lambda name: names[name][2],
            )
        )
    size, value, _ = names[chosen]
    same = runs[planned].isna() if pd.isna(value) else runs[planned] == value
    return runs[(runs["size"] == size) & same]


def recommendation(runs: pd.DataFrame, names: list[str], noise: analysis.SeedNoise | Refusal) -> None:
    """Which setting to use, or that none can be told from the best."""
    found = sweep_figures.ranking(runs, names, noise)
    if found is None:
        return
    with st.container(border=True):
        st.header(f":material/recommend: {layout.plain(found.headline)}", anchor=False)
        st.markdown(layout.plain(found.support))
        with st.expander("Every setting, best first", icon=":material/table_rows:"):
            layout.table(
                found.table,
                key="ranking",
                alt=f"{len(found.table)} settings by their mean loss",
                column_config={
                    "setting": st.column_config.TextColumn("Setting", pinned=True),
                    "loss": st.column_config.NumberColumn("Loss, nats/token", format="%.3f"),
                    "runs": st.column_config.NumberColumn("Runs"),
                    "apart": st.column_config.CheckboxColumn("Worse than the best, beyond the noise"),
                },
            )


def heat_maps(runs: pd.DataFrame, names: list[str], noise: analysis.SeedNoise | Refusal) -> None:
    """Loss and mean steps side by side over two options."""
    if len(names) < 2:
        text = f"only {OPTION_NAMES[names[0]]} varies" if names else "none of λ, β, l_max and τ varies"
        st.info(f"A heat map needs two options that vary; here {text}.", icon=":material/grid_view:")
        return
    with st.container(border=True):
        st.header("Effect of the options on loss and steps", anchor=False)
        split = names[2] if len(names) > 2 else None
        layout.chart(
            sweep_figures.heat_maps(runs, names[0], names[1], split, noise=noise),
            runs[["label", *names, "seed", "perplexity", "loss", "mean_steps"]],
            key="heat-maps",
            title="Loss and mean latent steps over the options",
            alt=f"Loss and mean latent steps over {' and '.join(OPTION_NAMES[n] for n in names[:2])}; lowest"
            f" loss {style.three(float(runs['loss'].min()))}",
        )
        st.caption(
            "A cell is the mean over seeds and whatever else varies, with ± half its 95 % interval from the study's "
            "seed noise and the number of runs n. **Grey cells cannot be told from the best one.** Lighter is a lower "
            "loss on the left, more steps on the right; one scale for all maps of a column."
            if isinstance(noise, analysis.SeedNoise)
            else "A cell is the mean over whatever else varies, with the number of runs n. No two runs differ in their "
            "seed only, so the noise is unknown: **no cell can be called better than another.**"
        )


def importance(runs: pd.DataFrame, names: list[str]) -> None:
    """Which options matter."""
    st.header("Importance of the options", anchor=False)
    found, refused = {}, {}
    settled = fits.settled(data.analysed(runs))
    for target in ("loss", "mean_steps"):
        table = analysis.importance(settled, names, target=target)
        if isinstance(table, Refusal):
            refused[target.replace("_", " ")] = table.reason
        else:
            found[target] = table
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
            "At one size and budget. Variance decomposition, main effects only. Up to the grey tick, chance explains "
            "as much; what is missing to 100 % is interaction and noise."
        )
    layout.refused(refused)


def slices(runs: pd.DataFrame, names: list[str], noise: analysis.SeedNoise | Refusal) -> None:
    """The runs along one option."""
    st.header("Along one option", anchor=False)
    if not names:
        st.info("No option varies at this size and budget.", icon=":material/linear_scale:")
        return
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
        sweep_figures.slice_of(runs, table, str(name), str(target), noise=noise),
        runs[["label", "size", str(name), str(target)]],
        key="slices",
        title=f"{target} along {OPTION_NAMES[str(name)]}",
        alt=f"{target} at {len(table)} values of {OPTION_NAMES[str(name)]}",
    )
    st.caption(
        "At one size and budget: a marker per run, a bar at the mean over whatever else varies"
        + (
            ", with its 95 % interval from the study's seed noise."
            if target == "loss" and isinstance(noise, analysis.SeedNoise)
            else "."
        )
    )


layout.live(body)
