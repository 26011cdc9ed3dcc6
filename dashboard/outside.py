"""Results from elsewhere, from a file of the reader's: drawn hollow beside the runs, part of no fit."""

from __future__ import annotations

import io

import pandas as pd

COLUMNS = ("label", "flops", "loss", "source")
MOST = 200


class OutsideError(ValueError):
    """The file is not what it should be; the message says what to change."""


def read(content: bytes) -> pd.DataFrame:
    """The points of a CSV file with the columns ``label``, ``flops`` (training FLOPs), ``loss`` (nats per token) and
    ``source``; at most :data:`MOST`.

    Raises:
        OutsideError: the file is no CSV, lacks a column, or has a FLOPs or loss that is not a positive number.
    """
    try:
        table = pd.read_csv(io.BytesIO(content))
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError) as error:
        raise OutsideError(f"the file is not a CSV table ({error})") from error
    table = table.rename(columns=lambda name: str(name).strip().lower())
    if missing := [name for name in COLUMNS if name not in table]:
        raise OutsideError(f"the file lacks the columns {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
    table = table[[*COLUMNS]].copy()
    for name in ("flops", "loss"):
        table[name] = pd.to_numeric(table[name], errors="coerce")
        wrong = table.index[~table[name].gt(0) | ~table[name].lt(float("inf"))]
        if len(wrong):
            raise OutsideError(f"line {wrong[0] + 2}: {name} must be a positive number")
    for name in ("label", "source"):
        table[name] = table[name].fillna("").astype(str)
    return table.head(MOST)
