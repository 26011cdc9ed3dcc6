"""How things look and how numbers are written: one place, so that a method has one colour on every page."""

from __future__ import annotations

import math
from functools import lru_cache

from plotly.colors import sample_colorscale

from haltscale.platform.arms import is_control

METHOD_COLORS = {
    "adaptive": "#0072B2",
    "vanilla": "#8C8C8C",
    "fixed": "#D55E00",
    "shuffled": "#E69F00",
    "looped": "#009E73",
    "pause": "#CC79A7",
    "ponder": "#56B4E9",
    "ponder2": "#3E7CB1",
    "mor": "#B79F00",
    "ponder3": "#7A5195",
    "adaponder": "#A6611A",
}
"""Okabe and Ito's palette, safe for colour-blind readers, and four darker neighbours, since there are more methods than
colours in it; grey stands for its black, which a dark page would hide. Dash and marker always differ too."""
OTHER_COLORS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down")

STATE_COLORS = {
    "finished": "green",
    "running": "blue",
    "planned": "gray",
    "stalled": "orange",
    "stopped": "gray",
    "capped": "yellow",
    "failed": "red",
    "diverged": "violet",
    "damaged": "red",
}
STATE_ICONS = {
    "finished": ":material/check_circle:",
    "running": ":material/play_circle:",
    "planned": ":material/schedule:",
    "stalled": ":material/pause_circle:",
    "stopped": ":material/stop_circle:",
    "capped": ":material/timer_off:",
    "failed": ":material/error:",
    "diverged": ":material/trending_up:",
    "damaged": ":material/broken_image:",
}

_BARS = """<g fill="#2f86c1">
<rect x="2" y="20" width="6" height="10" rx="1.5"/>
<rect x="11" y="13" width="6" height="17" rx="1.5"/>
<rect x="20" y="4" width="6" height="26" rx="1.5"/>
</g>
<rect x="29" y="4" width="6" height="26" rx="1.5" fill="none" stroke="#2f86c1" stroke-width="1.6"
 stroke-dasharray="3 2.4"/>"""
"""Three steps taken and one left out, in a blue that reads on light and dark pages alike."""

MARK = f"""<svg xmlns="http://www.w3.org/2000/svg" width="38" height="34" viewBox="0 0 38 34">
{_BARS}
</svg>"""
"""The browser tab's icon. A picture of our own: Streamlit would fetch a named icon from another host."""

WORDMARK = f"""<svg xmlns="http://www.w3.org/2000/svg" width="188" height="34" viewBox="0 0 188 34">
{_BARS}
<text x="46" y="26" font-family="'Source Sans 3','Source Sans Pro',system-ui,sans-serif" font-size="24"
 font-weight="700" fill="#2f86c1">haltscale</text>
</svg>"""

READABLE = """<style>
[data-testid="stCaptionContainer"], [data-testid="stCaptionContainer"] p { color: inherit !important; opacity: 0.85; }
</style>"""
"""Streamlit's own captions are too faint for WCAG's contrast of 4.5; these are the text's colour, a little lighter."""

SYMBOLS = {"lam": "λ", "beta": "β", "l_max": "l_max", "tau": "τ"}
"""Options under the letters of the paper."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


CONTROL_GREYS = {"shuffled": "#b4b4b4", "fixed": "#6e6e6e"}
"""What a replay control's colour is its subject's mixed with, half and half."""


def method_color(method: str) -> str:
    """The arm's colour; a method that is new here gets one by its name, the same on every page. A replay control has
    its subject's, greyed."""
    if is_control(method):
        subject, _, source = method.partition("/")
        own, grey = method_color(subject), CONTROL_GREYS[source]
        return "#" + "".join(f"{(int(own[i : i + 2], 16) + int(grey[i : i + 2], 16)) // 2:02x}" for i in (1, 3, 5))
    return METHOD_COLORS.get(method) or OTHER_COLORS[sum(method.encode()) % len(OTHER_COLORS)]


def shade(color: str, share: float) -> str:
    """A method's colour from dark (0) to light (1), for the values of an option; 0.5 is the colour itself.

    Both ends keep their distance from black and white, so that they show on a light page and on a dark one.
    """
    if not math.isfinite(share):
        return color
    target, weight = (0, 0.45 * (0.5 - share)) if share < 0.5 else (255, 0.75 * (share - 0.5))
    channels = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(channel + (target - channel) * weight):02x}" for channel in channels)


def translucent(color: str, alpha: float) -> str:
    """A colour with an opacity, as Plotly writes it."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha:g})"


@lru_cache(maxsize=256)
def step_color(step: int, most: int) -> str:
    """Cividis for ordinal steps: 0 is the dark end, ``most`` the light one."""
    (color,) = sample_colorscale("Cividis", [min(max(step, 0) / max(most, 1), 1.0)])
    red, green, blue = (round(float(part)) for part in color.removeprefix("rgb(").removesuffix(")").split(","))
    return f"#{red:02x}{green:02x}{blue:02x}"


def line_color(index: int, most: int) -> str:
    """Cividis for ordinal lines and markers, without its ends: they would be lost on a dark page or on a light one."""
    return step_color(25 * most + 60 * min(max(index, 0), most), 100 * most) if most else step_color(1, 2)


def ink_on(color: str) -> str:
    """Black or white, whichever reads better on a colour (by WCAG contrast)."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def three(value: float) -> str:
    """Three significant digits, without an exponent where a person would write none; a dash for a missing number."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.2e}"))))
    if -4 <= exponent < 6:
        return f"{value:,.{max(2 - exponent, 0)}f}" if exponent < 3 else f"{float(f'{value:.2e}'):,.0f}"
    return scientific(value)


def scientific(value: float) -> str:
    """``3.21×10¹²``."""
    if not math.isfinite(value) or value == 0:
        return "–" if not math.isfinite(value) else "0"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}×10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def signed(value: float) -> str:
    """A difference: ``+0.346``, ``−0.012``; three decimals below 10, where a loss in nats has no use for more."""
    if not math.isfinite(value):
        return "∞" if value == math.inf else "−∞" if value == -math.inf else "–"
    text = f"{abs(value):.3f}" if abs(value) >= 0.0995 else three(abs(value))
    return text if value == 0 else f"{'+' if value > 0 else '−'}{text}"


def power(value: float) -> str:
    """``3×10¹¹``: a round number in scientific notation, without zeros at its end."""
    return _tick(value) if value >= 1e5 else three(value)


def compact(value: float) -> str:
    """Counts with a suffix: ``1.02M``."""
    if not math.isfinite(value):
        return "–"
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{three(value / unit)}{suffix}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """``42 s``, ``4 min 10 s``, ``2 h 05 min``."""
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left:02d} min" if hours else f"{minutes} min {rest:02d} s"


def log_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Ticks of a logarithmic axis over ``low``..``high``: round numbers written in full, about eight at most."""
    decades = math.log10(high / low) if high > low > 0 else 0.0
    if 0 < decades < 0.3:  # so narrow that it is nearly linear: even steps of 1, 2 or 5
        rough = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= rough)
        values = [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return values, [_tick(value) for value in values]
    steps: tuple[float, ...]
    if decades > 4:
        steps = (1,)
    elif decades > 1.5:
        steps = (1, 3)
    elif decades > 0.6:
        steps = (1, 2, 3, 5)
    else:
        steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    start, end = math.floor(math.log10(low)), math.ceil(math.log10(high))
    values = [s * 10.0**e for e in range(start, end + 1) for s in steps if low * 0.999 <= s * 10.0**e <= high * 1.001]
    return values, [_tick(value) for value in values]


def _tick(value: float) -> str:
    if 1e-2 <= value < 1e5:
        return f"{value:,.6g}"
    digits, exponent = f"{value:.2e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    digits = digits.rstrip("0").rstrip(".")
    return power if digits == "1" else f"{digits}×{power}"
