"""The probe text with its latent steps: a Custom Component whose script writes text nodes only.

Token text is untrusted: a model may emit markup, control characters or direction overrides. It is made visible here,
and the component puts it on the page as text, never as HTML.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
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


def payload(events: pd.DataFrame, *, identifier: str) -> dict[str, Any]:
    """What the component is given: JSON only, numbers rounded to what is shown."""
    shown = events.head(MOST_TOKENS)
    tokens = []
    columns = ("text", "steps", "nll", "expected_steps", "reach", "exit")
    for text, steps, nll, expected, reach, leave in zip(*(shown[name] for name in columns), strict=True):
        tokens.append(
            {
                "text": visible(text),
                "break": isinstance(text, str) and "\n" in text,
                "steps": int(steps),
                "nll": _rounded(nll),
                "expected": _rounded(expected),
                "reach": _masses(reach),
                "exit": _masses(leave),
            }
        )
    most = most_steps(shown)
    colors = [style.step_color(step, most) for step in range(most + 1)]
    return {
        "id": identifier,
        "most": most,
        "tokens": tokens,
        "left_out": len(events) - len(shown),
        "palette": [{"background": color, "ink": style.ink_on(color)} for color in colors],
    }


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
