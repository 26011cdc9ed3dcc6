"""What does a model cost in training and serving together, and which method is cheapest at how many served tokens?"""

import math

import numpy as np
import pandas as pd
import streamlit as st

from haltscale.dashboard import answer, cost_figures, data, layout, style
from haltscale.dashboard.data import StudyView
from haltscale.platform.analysis import costs
from haltscale.platform.arms import shown

TITLE = "Cost"
ICON = ":material/payments:"
ORDER = 5
LOW, HIGH = 6, 13  # of the slider: powers of ten of served tokens
PRICE = 1.4  # dollars for 10^18 FLOPs: 2 dollars an hour for a GPU that does 4e14 of them a second
LOSS_STEP = 0.01


def body(view: StudyView) -> None:
    layout.heading(
        view, "Cost", says="What does a model cost in training and serving together, and which method is cheapest?"
    )
    kind = layout.flops_kind()
    runs = data.analysed(answer.comparable(view)).assign(planned_tokens=answer.comparable(view)["tokens"])
    models = costs.candidates(runs, f"flops_{kind}", f"inference_flops_{kind}")
    if models.empty:
        st.info(
            "No finished run says what it costs to serve a token: each finished run records it.",
            icon=":material/hourglass_empty:",
        )
        return
    low, high = rounded(float(models["loss"].min())), rounded(float(models["loss"].max()))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        power = st.slider(
            "Tokens served, as a power of ten", float(LOW), float(HIGH), 10.0, 0.25, key="served", bind="query-params",
            width=320,
        )  # fmt: skip
        loss = high
        if high > low:
            loss = st.slider(
                "Loss to be reached, nats/token", low, high, min(max(reached(view, models), low), high), LOSS_STEP,
                key="reach", bind="query-params", width=320,
            )  # fmt: skip
        price = st.number_input(
            "Price of 10¹⁸ FLOPs, dollars", 0.0, 1e6, PRICE, key="price", bind="query-params", width=220,
            help="2 dollars an hour for a GPU that does 4×10¹⁴ FLOPs a second are 1.4 dollars for 10¹⁸.",
        )  # fmt: skip
    served = 10.0**power
    best = costs.cheapest(models, loss, served)
    if best.empty:
        st.info("No model reaches that loss.", icon=":material/search_off:")
        return
    pair = answer.default_pair(view)
    crossings = costs.break_even(models, loss, *pair, 10.0**LOW, 10.0**HIGH) if pair else []
    verdict(best, models, loss, served, pair, crossings)
    table = costs.totals(models, loss, np.geomspace(10.0**LOW, 10.0**HIGH, 120))
    with st.container(border=True):
        layout.chart(
            cost_figures.totals(table, served, kind, crossings),
            table,
            key=f"cost-{kind}",
            title=f"{view.name}: training plus serving at {loss:.2f} nats/token",
            alt="; ".join(
                f"{row['method']}: {style.scientific(row['total'])} FLOPs" for row in best.to_dict("records")
            ),
        )
        st.caption(
            "Total = training FLOPs + tokens served × inference FLOPs per token. Each method is served by its cheapest "
            "model of those that reach the loss (means over seeds), so a line may change its model; the hover box "
            "names it. FLOPs are counted, not seconds: memory traffic and batching are not in them."
        )
    layout.table(
        best.assign(
            training=best["train"],
            serving=served * best["serve"],
            share=served * best["serve"] / best["total"],
            money=best["total"] * price / 1e18,
            method=best["method"].map(shown),
        )[["method", "label", "runs", "loss", "training", "serve", "serving", "total", "share", "money"]],
        key="cost-table",
        alt=f"Cheapest model of {len(best)} methods at {style.compact(served)} served tokens",
        column_config={
            "method": st.column_config.TextColumn("Method", pinned=True),
            "label": st.column_config.TextColumn("Model"),
            "runs": st.column_config.NumberColumn("Seeds"),
            "loss": st.column_config.NumberColumn("Loss, nats/token", format="%.3f"),
            "training": st.column_config.NumberColumn("Training FLOPs", format="scientific"),
            "serve": st.column_config.NumberColumn("FLOPs per token served", format="scientific"),
            "serving": st.column_config.NumberColumn("Serving FLOPs", format="scientific"),
            "total": st.column_config.NumberColumn("Total FLOPs", format="scientific"),
            "share": st.column_config.NumberColumn("Serving", format="percent"),
            "money": st.column_config.NumberColumn("Dollars", format="%.3g"),
        },
    )
    layout.honest(view)


def rounded(loss: float) -> float:
    """A loss at the slider's step, not below the loss itself."""
    return math.ceil(loss / LOSS_STEP - 1e-9) * LOSS_STEP


def reached(view: StudyView, models: pd.DataFrame) -> float:
    """The lowest loss that both sides of the study's comparison reach, else the lowest of all."""
    best = models.groupby("method")["loss"].min()
    pair = [name for name in answer.default_pair(view) or () if name in best]
    return rounded(float(best[pair].max() if pair else best.min()))


def verdict(
    best: pd.DataFrame,
    models: pd.DataFrame,
    loss: float,
    served: float,
    pair: tuple[str, str] | None,
    crossings: list[float],
) -> None:
    """Who is cheapest here, and where that changes."""
    first = best.iloc[0]
    text = f"At {style.compact(served)} tokens served and {loss:.2f} nats/token, {shown(first['method'])} is cheapest"
    if len(best) > 1:
        second = best.iloc[1]
        text += f"; {shown(second['method'])} costs {style.three(second['total'] / first['total'])} times as much"
    with st.container(border=True):
        st.header(f":material/payments: {layout.plain(text)}", anchor=False)
        if pair is None:
            return
        one, other = pair
        total = dict(zip(best["method"], best["total"], strict=True))
        if not {one, other} <= set(total):
            absent = next(name for name in pair if name not in total)
            st.markdown(layout.plain(f"No model of {shown(absent)} reaches this loss: no break-even."))
            return
        if crossings:
            where = " and ".join(f"{style.compact(at)} tokens" for at in crossings)
            st.markdown(layout.plain(f"Break-even between {shown(one)} and {shown(other)}: {where}."))
            return
        cheaper, dearer = sorted(pair, key=lambda name: float(total[name]))
        st.markdown(
            layout.plain(
                f"No break-even between {shown(one)} and {shown(other)}: {shown(cheaper)} costs less than "
                f"{shown(dearer)} at any number of served tokens from 10⁶ to 10¹³."
            )
        )


layout.live(body)
