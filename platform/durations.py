"""How durations are shown."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, or hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
