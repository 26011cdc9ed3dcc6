"""Search a run's held-out tokens: DuckDB over the parquet file of its events, so that ten million cost no memory."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from haltscale.platform.store import StoreError

MOST_FOUND = 200
BESIDE = 8
"""Tokens of context before and after a token that was found."""
AROUND = 60
"""Tokens before and after a place that is opened."""
LEAST_SEEN = 20
"""Occurrences below which a token type is in no ranking: the mean of a few says little."""


class Order(StrEnum):
    """What to look for first."""

    STEPS = "most latent steps"
    SURPRISED = "worst predicted"
    LOST = "steps that cost most"
    GAINED = "steps that gained most"

    @property
    def sql(self) -> str:
        """The ORDER BY clause."""
        gain = "nll_by_step[1] - nll_by_step[-1]"
        return {
            Order.STEPS: "steps DESC, expected_steps DESC, nll DESC",
            Order.SURPRISED: "nll DESC",
            Order.LOST: f"{gain} ASC NULLS LAST",
            Order.GAINED: f"{gain} DESC NULLS LAST",
        }[self]


def search(
    events: Path, tokenizer: Path, order: Order, *, text: str = "", token_class: str = "", limit: int = MOST_FOUND
) -> pd.DataFrame:
    """The first tokens in an order.

    Args:
        events: ``halting/events-<step>.parquet`` of a run.
        tokenizer: the run's ``tokenizer.json``; token ids stand for texts where there is none.
        text: only tokens whose text holds this, case aside.
        token_class: only tokens of this class.

    Returns:
        ``before``, ``token``, ``after`` (:data:`BESIDE` tokens of context each), ``steps``, ``expected_steps``,
        ``nll`` and ``gain`` (nats; NaN where the token was not read after each step), ``confidence``, ``frequency``,
        ``token_class``, ``document``, ``position``, and ``document_index``.

    Raises:
        StoreError: the file is damaged.
    """
    words = _words(tokenizer)
    conditions, values = ["TRUE"], [str(events)]
    if text:
        wanted = [str(token) for token, word in words.items() if text.lower() in word.lower()]
        conditions.append(f"token_id IN ({', '.join(wanted)})" if wanted else "FALSE")  # numbers of our own
    if token_class:
        conditions.append("token_class = ?")
        values.append(token_class)
    query = f"""
        SELECT token_id, steps, expected_steps, nll, nll_by_step[1] - nll_by_step[-1] AS gain, confidence, frequency,
               token_class, document, position
        FROM read_parquet(?) WHERE {" AND ".join(conditions)} ORDER BY {order.sql} LIMIT {int(limit)}
    """
    try:
        with duckdb.connect() as connection:
            found = connection.execute(query, values).df()
            connection.register("found", found[["document", "position"]].assign(place=range(len(found))))
            beside = connection.execute(NEIGHBOURS, [str(events), BESIDE, BESIDE]).df()
        names = _documents(events)
    except (duckdb.Error, OSError, ValueError) as error:
        raise StoreError(f"{events} cannot be searched ({error})") from error
    found.insert(0, "token", [words.get(int(token), f"#{token}") for token in found.pop("token_id")])
    before, after = _context(beside, words, len(found))
    found.insert(0, "before", before)
    found.insert(2, "after", after)
    found["document_index"] = found["document"]
    found["document"] = [names.get(int(index), str(index)) for index in found["document"]]
    return found


NEIGHBOURS = """
    SELECT f.place, CAST(e.position AS BIGINT) - CAST(f.position AS BIGINT) AS apart, e.token_id
    FROM read_parquet(?) e JOIN found f ON e.document = f.document
    WHERE CAST(e.position AS BIGINT) BETWEEN CAST(f.position AS BIGINT) - ? AND CAST(f.position AS BIGINT) + ?
    ORDER BY f.place, e.position
"""


def _context(beside: pd.DataFrame, words: dict[int, str], count: int) -> tuple[list[str], list[str]]:
    """The text before and after each place."""
    sides: tuple[list[str], list[str]] = ([""] * count, [""] * count)
    for place, apart, token in beside[["place", "apart", "token_id"]].itertuples(index=False):
        if apart:
            sides[int(apart > 0)][int(place)] += words.get(int(token), f"#{token} ")
    return sides


def ranking(events: Path, tokenizer: Path, *, least: int = LEAST_SEEN, limit: int = MOST_FOUND) -> pd.DataFrame:
    """Token types by their mean latent steps, most first.

    Args:
        least: occurrences that a type needs.

    Returns:
        ``token``, ``occurrences``, ``mean_steps``, ``error`` (its standard error), ``nll`` (mean nats) and ``gain``
        (mean nats that the steps gained, of the tokens that were read after each step).

    Raises:
        StoreError: the file is damaged.
    """
    query = f"""
        SELECT token_id, count(*) AS occurrences, avg(steps) AS mean_steps,
               coalesce(stddev_samp(steps), 0) / sqrt(count(*)) AS error, avg(nll) AS nll,
               avg(nll_by_step[1] - nll_by_step[-1]) AS gain
        FROM read_parquet(?) GROUP BY token_id HAVING count(*) >= {int(least)}
        ORDER BY mean_steps DESC, occurrences DESC, token_id LIMIT {int(limit)}
    """
    words = _words(tokenizer)
    try:
        with duckdb.connect() as connection:
            found = connection.execute(query, [str(events)]).df()
    except (duckdb.Error, OSError) as error:
        raise StoreError(f"{events} cannot be searched ({error})") from error
    found.insert(0, "token", [words.get(int(token), f"#{token}") for token in found.pop("token_id")])
    return found


def place(events: Path, tokenizer: Path, document: int, position: int, *, around: int = AROUND) -> pd.DataFrame:
    """The tokens around a place as the token map takes them: ``text``, ``position``, ``steps``, ``nll``,
    ``expected_steps``, ``reach``, ``exit``, ``nll_by_step``.

    Raises:
        StoreError: the file is damaged.
    """
    words = _words(tokenizer)
    query = """
        SELECT token_id, position, steps, nll, expected_steps, nll_by_step FROM read_parquet(?)
        WHERE document = ? AND CAST(position AS BIGINT) BETWEEN ? AND ? ORDER BY position
    """
    try:
        with duckdb.connect() as connection:
            rows = connection.execute(query, [str(events), document, position - around, position + around]).df()
    except (duckdb.Error, OSError) as error:
        raise StoreError(f"{events} cannot be searched ({error})") from error
    rows.insert(0, "text", [words.get(int(token), f"#{token}") for token in rows.pop("token_id")])
    return rows.assign(reach=None, exit=None, steps=rows["steps"].astype(int))


def _words(tokenizer: Path) -> dict[int, str]:
    if not tokenizer.is_file():
        return {}
    try:
        loaded: Any = Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # the library raises plain Exceptions
        raise StoreError(f"{tokenizer} is no tokenizer ({error})") from error
    return {index: loaded.decode([index], skip_special_tokens=False) for index in range(loaded.get_vocab_size())}


def _documents(events: Path) -> dict[int, str]:
    """Names of the documents, where the file's metadata has them."""
    metadata = pq.read_schema(events).metadata or {}
    names = json.loads(metadata.get(b"haltscale", b"{}")).get("documents", [])
    return {index: str(name) for index, name in enumerate(names)}
