"""The probe text with its latent steps: a Custom Component whose script writes text nodes only.

Token text is untrusted: a model may emit markup, control characters or direction overrides. It is made visible here,
and the component puts it on the page as text, never as HTML.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from haltscale.dashboard import style
from haltscale.dashboard.data import number
from haltscale.dashboard.figures import most_steps

MOST_TOKENS = 2_000
"""Tokens shown at once: beyond this a browser gets slow, and nobody reads on."""

_HERE = Path(__file__).parent


def visible(text: object) -> str:
    """A token's text with everything that would not be seen, or would disturb what stands around it, spelled out."""
    if not isinstance(text, str) or text == "":
        return "∅"
    shown = []
    for position, char in enumerate(text):
        if char == "\n":
            shown.append("↵")
        elif char == "\t":
            shown.append("⇥")
        elif char == " ":
            # A space at a token's edge is part of the token; inside it is only a space.
            shown.append("·" if position in (0, len(text) - 1) else " ")
        elif ord(char) < 0x20 or ord(char) == 0x7F:
            shown.append(f"\\x{ord(char):02x}")
        elif unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"):
            shown.append(f"\\u{ord(char):04x}")
        elif unicodedata.combining(char) and position == 0:
            shown.append(f"◌{char}")
        else:
            shown.append(char)
    return "".join(shown)


def _masses(value: object) -> list[float]:
    """A list of masses as plain numbers; parquet hands out numpy arrays."""
    if not isinstance(value, list | tuple | np.ndarray):
        return []
    masses = [number(mass) for mass in value]
    return [0.0 if math.isnan(mass) else round(mass, 5) for mass in masses]


class Colour(StrEnum):
    """What a token's colour says; the same number stands under it."""

    STEPS = "steps"
    SURPRISAL = "surprisal"
    GAIN = "gain"

    @property
    def legend(self) -> str:
        """Name and unit."""
        return {
            Colour.STEPS: "latent steps before the token",
            Colour.SURPRISAL: "NLL of the token, nats",
            Colour.GAIN: "what its steps gained: NLL(0) − NLL, nats",
        }[self]


def legend(events: pd.DataFrame, colour: Colour) -> str:
    """Name and unit of the number under a token."""
    both = colour is Colour.STEPS and "need" in events
    return "latent steps before the token / steps that it needs (–: unpredictable)" if both else colour.legend


SURPRISAL_EDGES = (0.5, 1.0, 2.0, 4.0, 6.0, 8.0)
GAIN_EDGES = (-0.5, -0.1, -0.01, 0.01, 0.1, 0.5)
GAIN_COLORS = ("#b2182b", "#e08068", "#f4c4ad", "#f2f2f2", "#b3d2e5", "#5a9fcd", "#1f66a8")
"""From lost to gained; red and blue are told apart with any colour vision, and the sign is written under the token."""


def gain(by_step: object) -> float:
    """Nats that the last of a token's steps gained over none; NaN where it was not read after every step."""
    if not isinstance(by_step, list | tuple | np.ndarray) or len(by_step) == 0:
        return math.nan
    return number(float(by_step[0])) - number(float(by_step[-1]))


def payload(events: pd.DataFrame, *, identifier: str, colour: Colour = Colour.STEPS) -> dict[str, Any]:
    """What the component is given: JSON only, numbers rounded to what is shown."""
    shown = events.head(MOST_TOKENS)
    most = most_steps(shown)
    steps_colors = [style.step_color(step, most) for step in range(most + 1)]
    edges: tuple[float, ...]
    if colour is Colour.STEPS:
        values, edges, colors = shown["steps"].to_numpy(float), tuple(np.arange(most) + 0.5), steps_colors
        names = [str(step) for step in range(most + 1)]
    elif colour is Colour.SURPRISAL:
        values, edges = pd.to_numeric(shown["nll"], errors="coerce").to_numpy(float), SURPRISAL_EDGES
        colors = [style.step_color(level, len(edges)) for level in range(len(edges) + 1)]
        names = _ranges(edges)
    else:
        values, edges, colors = np.array([gain(one) for one in shown["nll_by_step"]], float), GAIN_EDGES, [*GAIN_COLORS]
        names = _ranges(edges)
    levels = np.where(np.isnan(values), 0, np.searchsorted(edges, np.nan_to_num(values), side="right"))
    tokens = []
    columns = ("text", "steps", "nll", "expected_steps", "reach", "exit", "nll_by_step")
    needs = [needed(need) for need in shown["need"]] if "need" in shown else [""] * len(shown)
    rows = zip(*(shown[name] for name in columns), needs, values, levels, strict=True)
    for text, steps, nll, expected, reach, leave, by_step, need, value, level in rows:
        tokens.append(
            {
                "text": visible(text),
                "break": isinstance(text, str) and "\n" in text,
                "steps": int(steps),
                "need": need,
                "nll": _rounded(nll),
                "expected": _rounded(expected),
                "reach": _masses(reach),
                "exit": _masses(leave),
                "by_step": _masses(by_step),
                "level": int(level),
                "shown": _under(colour, value) + (f"/{need}" if need and colour is Colour.STEPS else ""),
            }
        )
    counts = np.bincount(levels, minlength=len(colors)) if len(levels) else np.zeros(len(colors), dtype=int)
    return {
        "id": f"{identifier}/{colour}",
        "most": most,
        "tokens": tokens,
        "left_out": len(events) - len(shown),
        "legend": legend(events, colour),
        "levels": [
            {"background": color, "ink": style.ink_on(color), "name": name, "count": int(count)}
            for color, name, count in zip(colors, names, counts, strict=True)
        ],
        "palette": [{"background": color, "ink": style.ink_on(color)} for color in steps_colors],
    }


UNPREDICTABLE = "–"


def needed(need: object) -> str:
    """The latent steps that a token needs; :data:`UNPREDICTABLE` where no computation predicts it, empty where that is
    not known."""
    found = number(need)
    return "" if math.isnan(found) else UNPREDICTABLE if found < 0 else f"{found:.0f}"


def _ranges(edges: Sequence[float]) -> list[str]:
    return [f"< {edges[0]:g}", *(f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)), f"> {edges[-1]:g}"]


def _under(colour: Colour, value: float) -> str:
    """The number under a token."""
    if math.isnan(value):
        return "–"
    return str(int(value)) if colour is Colour.STEPS else f"{value:+.2g}" if colour is Colour.GAIN else f"{value:.2g}"


def _rounded(value: object) -> float | None:
    """A number for JSON, which knows no NaN."""
    found = number(value)
    return None if math.isnan(found) else round(found, 4)


@cache
def _component() -> Any:
    return st.components.v2.component(
        "haltscale_tokens",
        html="<div class='halting'></div>\n<!-- filled by tokens.js -->",
        css=(_HERE / "tokens.css").read_text(encoding="utf-8"),
        js=(_HERE / "tokens.js").read_text(encoding="utf-8"),
    )


def show(data: Mapping[str, Any], *, key: str) -> None:
    """Put the tokens on the page."""
    _component()(data=dict(data), key=key)
