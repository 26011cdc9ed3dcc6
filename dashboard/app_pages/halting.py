"""How latent steps were allocated across tokens, and whether they paid: by need, by kind of token, over training."""

import pandas as pd
import streamlit as st

from haltscale.dashboard import data, figures, halting_figures, layout, style
from haltscale.dashboard.cached_store import store
from haltscale.dashboard.data import StudyView, mapping, number
from haltscale.dashboard.halting_figures import DIMENSIONS, table_of
from haltscale.platform import arms
from haltscale.platform.store import StoreError
from haltscale.platform.sweeps import report

TITLE = "Halting"
ICON = ":material/hourglass_top:"
ORDER = 3
MOST_ROWS = 24
MOST_PAIRS = 10
MOST_ARMS = 8
MOST_LADDERS = 8
MOST_READ = 100
INTERVAL = ("mean", "low", "high")


def body(view: StudyView) -> None:
    layout.heading(view, "Allocation of latent steps", says="Where do the latent steps go, and do they pay?")
    counted = data.thinking(view.runs)
    if counted.empty:
        st.info(
            "No run that may think has reported its halting yet. The distribution of latent steps appears with the "
            "first evaluation.",
            icon=":material/hourglass_empty:",
        )
        return
    needs(view)
    every_run(counted)
    left, right = st.columns(2)
    with left, st.container(border=True, height="stretch"):
        easy_and_hard(counted)
    with right, st.container(border=True, height="stretch"):
        beside_controls(view)
    ladder(view, counted)
    one_run(view, counted)
    layout.honest(view)


def needs(view: StudyView) -> None:
    """Steps given against steps needed, where the text says what each token needs."""
    rows = data.needed(view.runs)
    if rows.empty:
        return
    arms_of = list(dict.fromkeys(rows["arm"]))
    shown = rows[rows["arm"].isin(arms_of[:MOST_ARMS])]
    with st.container(border=True):
        st.header("Steps given against steps needed", anchor=False)
        layout.chart(
            halting_figures.steps_by_need(shown),
            shown,
            key="steps-by-need",
            title="Share of validation tokens by latent steps given, by steps needed",
            alt="; ".join(
                f"{row['arm']}, need {halting_figures.need_name(row['need'])}: {style.three(row['mean_steps'])} steps"
                for row in shown.to_dict("records")
            ),
        )
        st.caption(
            "In this text the latent steps that a token needs are known by construction. No computation predicts an "
            "*unpredictable* token: every step spent on it is wasted. A router that chooses well gives as many "
            "steps as are needed; its replay controls take as many, elsewhere."
            + (
                f" The first {MOST_ARMS} of {len(arms_of)} arms: filter in the sidebar."
                if len(arms_of) > MOST_ARMS
                else ""
            )
        )
        for column, (measure, title) in zip(st.columns(2), halting_figures.MEASURES.items(), strict=True):
            with column:
                layout.chart(
                    halting_figures.measure_by_need(shown, measure),
                    shown,
                    key=f"{measure}-by-need",
                    title=f"Validation tokens by steps needed: {title}",
                    alt="; ".join(
                        f"{row['arm']}, need {halting_figures.need_name(row['need'])}: {style.three(row[measure])}"
                        for row in shown.to_dict("records")
                    ),
                )
        table = halting_figures.need_table(rows)
        layout.table(
            table,
            key="need-table",
            alt="Rank correlation, accuracy, loss and latent steps by arm and by steps needed",
            column_config={
                "Arm": st.column_config.TextColumn(pinned=True),
                **{
                    name: st.column_config.NumberColumn(format="%.2f" if name.startswith("Steps") else "%.3f")
                    for name in table.columns[2:]
                },
                "Rank corr.": st.column_config.NumberColumn(
                    format="%.3f",
                    help="Spearman's, between the steps that tokens need (an unpredictable one: 0) and those that they "
                    "get, over all tokens; the mean over the runs. None where one of the two never varies.",
                ),
            },
        )


def every_run(counted: pd.DataFrame) -> None:
    """The distribution of steps, a bar per run."""
    with st.container(border=True):
        st.header("How many latent steps the tokens got", anchor=False)
        shown = counted.head(MOST_ROWS)
        layout.chart(
            figures.steps_share(shown),
            shown[["label", "size", "lam", "mean_steps", "expected_steps", "steps_histogram"]],
            key="steps-share",
            title="Share of validation tokens by latent steps",
            alt=f"Share of validation tokens by latent steps in {len(shown)} runs",
        )
        st.caption(
            "Validation tokens, by the latent steps that ran before the token was emitted. A run that is not finished "
            "stands at its last evaluation; runs that cannot think are left out."
            + (
                f" The first {MOST_ROWS} of {len(counted)} runs: filter in the sidebar."
                if len(counted) > MOST_ROWS
                else ""
            )
        )


def easy_and_hard(counted: pd.DataFrame) -> None:
    """Whether the steps went to the tokens that are hard."""
    st.header("Easy against hard tokens", anchor=False)
    every = counted.dropna(subset=["well_steps", "badly_steps"])
    known = every.head(MOST_PAIRS)
    if known.empty:
        st.info(
            "Finished runs that may think show here what easy and hard tokens got.", icon=":material/hourglass_empty:"
        )
        return
    layout.chart(
        figures.easy_and_hard(known),
        known[["label", "well_steps", "badly_steps"]],
        key="easy-and-hard",
        title="Mean latent steps of well- and badly-predicted tokens",
        alt=f"Mean latent steps of well- and badly-predicted tokens in {len(known)} runs",
    )
    st.caption(
        "Well predicted is the quarter of tokens with the lowest NLL, badly predicted the quarter with the highest. "
        "A router that spends its steps where they may help gives badly-predicted tokens (diamonds) more than "
        "well-predicted ones (circles)."
        + (f" The first {MOST_PAIRS} of {len(every)} runs: filter in the sidebar." if len(every) > MOST_PAIRS else "")
    )


def beside_controls(view: StudyView) -> None:
    """Learned halting against the same steps taken elsewhere."""
    st.header("Learned halting beside its controls", anchor=False)
    runs = view.runs[data.sound(view.runs) & view.runs["loss"].notna() & view.runs["mean_steps"].gt(0)]
    runs = runs.head(500)
    layout.chart(
        halting_figures.controls(runs),
        runs[["label", "method", "size", "lam", "mean_steps", "loss"]],
        key="controls",
        title="Loss against mean latent steps",
        alt=f"Loss against mean latent steps of {len(runs)} runs",
    )
    st.caption(
        "A replay control is its subject with its numbers of steps dealt to other tokens (*/shuffled*) or spread "
        "evenly (*/fixed*), trained in all else alike. A router that chooses well lies below both."
    )
    pairs = report.control_differences(store(), view.name)
    if len(pairs):
        shown = pairs.assign(
            difference=[
                row["problem"] or f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"
                for row in pairs.to_dict("records")
            ]
        )
        layout.table(
            shown[["subject", "control", "seeds", "documents", "subject_steps", "control_steps", "difference"]],
            key="control-differences",
            alt="Nats of controls minus nats of their subjects",
            column_config={
                "difference": st.column_config.TextColumn("Control minus subject, nats/token"),
                "subject_steps": st.column_config.NumberColumn("Steps", format="%.3f"),
                "control_steps": st.column_config.NumberColumn("Control's steps", format="%.3f"),
            },
        )
        st.caption(
            "Paired by held-out document and seed; 95 % intervals by a bootstrap over documents and seeds together. "
            "Above 0 the learned router is better."
        )
    elif not any(arms.is_control(name) for name in runs["method"]):
        st.caption("This study has no replay controls: add controls(of=...) to its sweep.")


def ladder(view: StudyView, counted: pd.DataFrame) -> None:
    """The learned router against ways of halting that know less and more, on the same weights."""
    routed = counted[(counted["state"] == "finished") & counted["routed"]]
    shelf = store()
    rows: list[pd.DataFrame] = []
    for run in routed.head(MOST_READ).to_dict("records"):
        if len(rows) == MOST_LADDERS:
            break
        try:
            found = mapping(shelf.later_evaluations(view.name, str(run["key"])).get("controls"))
        except data.UNREADABLE:
            continue
        rungs = halting_figures.ladder_rows(found, str(run["label"]))
        rows += [rungs] if len(rungs) else []
    if routed.empty:
        return
    table = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()
    st.header("The ladder: fixed < post hoc < learned < oracle", anchor=False)
    if table.empty:
        st.info(
            "No router has been read beside other ways of halting on its own weights. It appears here after:",
            icon=":material/stairs:",
        )
        st.code(f"haltscale evaluate {view.name}/{routed['key'].iloc[-1]} --controls", language=None)
        return
    with st.container(border=True):
        if verdict := halting_figures.ladder_verdict(table):
            st.markdown(f"**{layout.plain(verdict)}**")
        layout.chart(
            halting_figures.ladder(table),
            table,
            key="ladder",
            title=f"{view.name}: other ways of halting on the same weights",
            alt="; ".join(
                f"{row['run']}, {row['rung']}: {style.signed(row['mean'])} nats"
                for row in table.head(24).to_dict("records")
            ),
        )
        st.caption(
            "One checkpoint's weights, read again with its steps given otherwise, as many on average: a router that "
            "knows something is better than fixed, shuffled and every training-free rule; the oracle is what perfect "
            "places would reach. *Full* takes all steps everywhere. Intervals are 95 %, paired by token or document."
        )


def one_run(view: StudyView, counted: pd.DataFrame) -> None:
    """The telemetry of one run at one evaluation."""
    st.header("One run, token by token in numbers", anchor=False)
    shelf = store()
    labels = dict(zip(counted["key"], counted["label"], strict=True))
    keys = list(labels)
    first = data.telling(counted, [key for key in keys if data.halting_steps(shelf, view.name, key)] or keys)
    left, right = st.columns(2)
    with left:
        key = st.selectbox(
            "Run",
            keys,
            index=keys.index(first),
            format_func=lambda key: labels.get(key, key),
            key="halting-run",
            bind="query-params",
        )
    steps = data.halting_steps(shelf, view.name, key)
    summary: dict[str, object] = {}
    if steps:
        with right:
            step = layout.choose_step(steps, key="halting-step")
        try:
            summary = shelf.halting_summary(view.name, key, step)
        except StoreError as error:
            st.warning(layout.plain(error), icon=":material/broken_image:")
    routed = dict(zip(counted["key"], counted["routed"], strict=True))[key]
    for alarm in summary.get("alarms") or [] if routed else []:  # type: ignore[attr-defined]
        st.warning(f"**Router alarm**: {layout.plain(alarm)}", icon=":material/notification_important:")
    left, right = st.columns(2)
    with left, st.container(border=True, height="stretch"):
        over_training(view, key, labels[key])
    if not summary:
        right.info("This run has written no per-token telemetry.", icon=":material/sensors_off:")
        return
    with right, st.container(border=True, height="stretch"):
        by_kind(summary)
    left, right = st.columns(2)
    with left, st.container(border=True, height="stretch"):
        gains(summary)
    with right, st.container(border=True, height="stretch"):
        calibration(summary)


def over_training(view: StudyView, key: str, label: str) -> None:
    """The distribution of steps as training goes on, of one run."""
    st.subheader("How halting changed in training", anchor=False)
    shelf = store()
    rows, source = data.evaluations(shelf, view.name, key), "validation tokens at each evaluation"
    if len(rows) < 2:
        rows, source = data.metrics(shelf, view.name, key), "training tokens at each logged step"
    if "steps_histogram" not in rows:
        st.info("This run has written no telemetry of its steps.", icon=":material/sensors_off:")
        return
    layout.chart(
        figures.steps_over_training(rows),
        rows,
        key="steps-over-training",
        title=f"{label}: latent steps over training",
        alt=f"Share of tokens by latent steps over training of {label}",
    )
    st.caption(f"Shares of {source}.")


def by_kind(summary: dict[str, object]) -> None:
    """Mean steps along surprisal, frequency, position or class."""
    st.subheader("Which tokens got the steps", anchor=False)
    dimension = st.segmented_control(
        "By",
        list(DIMENSIONS),
        default="by_surprisal",
        required=True,
        key="by",
        bind="query-params",
        format_func=lambda name: name.removeprefix("by_").replace("_", " "),
        label_visibility="collapsed",
    )
    rows = table_of(summary.get(str(dimension)), ("value", "tokens", "mean_steps", "low", "high", "loss"))
    layout.chart(
        halting_figures.steps_by(rows, str(dimension)),
        rows,
        key=f"steps-{dimension}",
        title=f"Mean latent steps {str(dimension).replace('_', ' ')}",
        alt="; ".join(f"{row['value']}: {style.three(row['mean_steps'])} steps" for row in rows.to_dict("records")),
    )
    st.caption("Means with 95 % intervals that take tokens as independent; validation tokens.")


def gains(summary: dict[str, object]) -> None:
    """What each step was worth, and what the best stopping would have been."""
    st.subheader("Did the steps pay?", anchor=False)
    rows = table_of(summary.get("gain_by_depth"), ("depth", "step", "tokens", *INTERVAL))
    oracle = mapping(summary.get("oracle"))
    if rows.empty:
        st.info("No token was read after every step.", icon=":material/sensors_off:")
        return
    layout.chart(
        halting_figures.gains(rows),
        rows,
        key="gains",
        title="NLL after each latent step, against none",
        alt="; ".join(
            f"halted after {row['depth']:.0f}, step {row['step']:.0f}: {style.three(row['mean'])} nats"
            for row in rows.to_dict("records")
        ),
    )
    told = ""
    if oracle:
        gap = mapping(oracle.get("gap"))
        mean, low, high = (style.three(number(gap.get(name))) for name in INTERVAL)
        told = (
            f"Oracle gap: stopping each token at its best step would save {mean} nats/token [{low}, {high}]; "
            f"{style.three(100 * number(oracle.get('stopped_there')))} % of the tokens stopped there."
        )
    st.caption(f"Nats of the token had it stopped after step k, against none; below 0 the steps helped. {told}")


def calibration(summary: dict[str, object]) -> None:
    """Whether the model knows what it knows, and how certain its router is."""
    st.subheader("Calibration", anchor=False)
    found = mapping(summary.get("calibration"))
    rows = table_of(found.get("bins"), ("from", "tokens", "confidence", "accuracy"))
    layout.chart(
        halting_figures.calibration(rows),
        rows,
        key="calibration",
        title="Calibration of the likeliest token",
        alt=f"Calibration; expected error {style.three(number(found.get('expected_error')))}",
    )
    entropy = mapping(summary.get("router_entropy"))
    st.caption(
        f"Expected calibration error {style.three(number(found.get('expected_error')))}; entropy of the router's exit "
        f"masses {style.three(number(entropy.get('mean')))} nats per token (0: always certain when to stop)."
    )


layout.live(body)
