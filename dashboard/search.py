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
        ``token``, ``steps``, ``expected_steps``, ``nll`` and ``gain`` (nats), ``confidence``, ``frequency``,
        ``token_class``, ``document``, ``position``.

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
        names = _documents(events)
    except (duckdb.Error, OSError, ValueError) as error:
        raise StoreError(f"{events} cannot be searched ({error})") from error
    found.insert(0, "token", [words.get(int(token), f"#{token}") for token in found.pop("token_id")])
    found["document"] = [names.get(int(index), str(index)) for index in found["document"]]
    return found


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
