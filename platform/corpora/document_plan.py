"""Which documents are trained on, held out, or dropped as duplicates: queries over the light columns of all shards.

DuckDB works out of core, so memory stays flat however many documents there are.
"""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.dataset

from haltscale.platform.corpora.corpus import Corpus, CorpusError
from haltscale.platform.corpora.formats import printable
from haltscale.platform.corpora.shard_jobs import write_dropped

MEMORY = "1GB"


@dataclass(frozen=True, kw_only=True)
class DocumentPlan:
    """The documents' parts in the corpus; a ``dropped`` file beside each shard lists those not trained on."""

    shards: list[dict[str, Any]]
    """In order: index, source, take (documents within the source's limit), train_tokens (end-of-text included)."""
    sources: dict[str, dict[str, Any]]
    """By name: documents, tokens and bytes to train on; duplicates; what was skipped and altered, by reason."""
    held_out: list[dict[str, Any]]
    """In order: shard, position, name, source."""
    probe: dict[str, Any]
    """Like one of ``held_out``."""

    def totals(self) -> dict[str, Any]:
        """Of all sources: documents, tokens and bytes to train on, and bytes per token."""
        names = ("train_documents", "train_bytes", "train_tokens")
        sums = {name: sum(source[name] for source in self.sources.values()) for name in names}
        text_tokens = sums["train_tokens"] - sums["train_documents"]  # without end-of-text
        return {**sums, "bytes_per_token": sums["train_bytes"] / max(1, text_tokens)}


def plan_documents(corpus: Corpus, shards: list[dict[str, Any]], work: Path) -> DocumentPlan:
    """Decide about every document.

    Args:
        corpus: says how many are held out, and which one is the probe.
        shards: tokenising's result for each shard: index, source, documents, skipped, altered.
        work: the folder of the tokenised shards.

    Raises:
        CorpusError: a source has too few documents, or the probe document is not there.
    """
    taken: Counter[str] = Counter()
    for shard in shards:
        limit = corpus.sources[shard["source"]].documents
        left = shard["documents"] if limit is None else max(0, limit - taken[shard["source"]])
        shard["take"] = min(shard["documents"], left)
        taken[shard["source"]] += shard["take"]
    try:
        probe, held_out, counted, duplicates = _decide(corpus, shards, work)
    except duckdb.IOException as error:  # of its own temporary files, and of the list that it writes
        raise OSError(errno.ENOSPC, str(error)) from error
    by_shard = {shard: (int(documents), int(tokens), int(size)) for shard, documents, tokens, size in counted}
    sources: dict[str, dict[str, Any]] = {}
    for shard in shards:
        documents, tokens, size = by_shard.get(shard["index"], (0, 0, 0))
        shard["train_tokens"] = tokens
        zero: dict[str, Any] = {"train_documents": 0, "train_bytes": 0, "train_tokens": 0, "duplicates": 0}
        zero |= {"skipped": Counter(), "altered": Counter()}
        source = sources.setdefault(shard["source"], zero)
        source["train_documents"] += documents
        source["train_bytes"] += size
        source["train_tokens"] += tokens
        source["skipped"].update(shard["skipped"])
        source["altered"].update(shard["altered"])
    for name, count in duplicates:
        sources[name]["duplicates"] = count
    return DocumentPlan(shards=shards, sources=sources, held_out=held_out, probe=probe)


def _decide(corpus: Corpus, shards: list[dict[str, Any]], work: Path) -> tuple[Any, ...]:
    """The queries: probe, held-out documents; of what is left documents, tokens and bytes by shard; duplicates."""
    with duckdb.connect() as db:
        quoted = str(work).replace("'", "''")
        db.execute(f"SET memory_limit = '{MEMORY}'; SET temp_directory = '{quoted}/duckdb'; SET threads = 2")
        _view(db, shards, work)
        if corpus.remove_duplicates:
            db.execute(
                "INSERT INTO dropped SELECT shard, position, 'duplicate' FROM (SELECT *, row_number() OVER"
                " (PARTITION BY content ORDER BY known_as = $probe DESC, name_hash, shard, position) AS copy"
                " FROM documents WHERE content IN (SELECT content FROM documents GROUP BY content HAVING count(*) > 1))"
                " WHERE copy > 1",
                {"probe": printable(corpus.probe_document)},
            )
        probe, held_out = _hold_out(db, corpus, shards)
        counted = db.execute(
            "SELECT shard, count(*) AS documents, sum(n_tokens + 1) AS tokens, sum(bytes) AS bytes"
            " FROM documents ANTI JOIN dropped USING (shard, position) GROUP BY shard"
        ).fetchall()
        duplicates = db.execute(
            "SELECT source, count(*) FROM dropped JOIN shards USING (shard) WHERE role = 'duplicate' GROUP BY source"
        ).fetchall()
        dropped = db.execute("SELECT shard, list(position) FROM shards LEFT JOIN dropped USING (shard) GROUP BY shard")
        while row := dropped.fetchone():
            write_dropped(work, row[0], [position for position in row[1] if position is not None])
    return probe, held_out, counted, duplicates


def _view(db: duckdb.DuckDBPyConnection, shards: list[dict[str, Any]], work: Path) -> None:
    """``documents``: every document within its source's limit, without its tokens; ``dropped``, still empty."""
    columns = {"shard": "index", "source": "source", "take": "take"}
    table = pd.DataFrame({column: [shard[key] for shard in shards] for column, key in columns.items()})
    db.register("shards_given", table)
    files = [f"{work}/tokens-{shard['index']:06d}.parquet" for shard in shards]
    db.register("tokenised", pyarrow.dataset.dataset(files))  # its columns are read as far as a query asks for them
    db.execute("CREATE TABLE shards AS SELECT * FROM shards_given")
    known_as = "name" if table["source"].nunique() == 1 else "source || '/' || name"
    db.execute(
        f"CREATE VIEW documents AS SELECT shard, position, source, name, {known_as} AS known_as, name_hash, content,"
        f" bytes, n_tokens FROM tokenised JOIN shards USING (shard) WHERE position < take"
    )
    db.execute("CREATE TABLE dropped (shard INTEGER, position INTEGER, role VARCHAR)")


def _hold_out(
    db: duckdb.DuckDBPyConnection, corpus: Corpus, shards: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The probe and the held-out documents, chosen by the hashes of their names."""
    free = "FROM documents ANTI JOIN dropped USING (shard, position)"
    select = f"SELECT shard, position, name, source {free}"
    first = min(corpus.sources)
    if corpus.probe_document:
        probes = _rows(db, f"{select} WHERE known_as = $1 LIMIT 1", printable(corpus.probe_document))
        if not probes:
            raise CorpusError(corpus.name, [f"probe_document {corpus.probe_document!r} is not in its sources"])
    else:
        probes = _rows(db, f"{select} WHERE source = $1 ORDER BY name_hash, shard, position LIMIT 1", first)
    _drop(db, probes, "probe")
    problems, held_out = [], []
    for name in sorted(corpus.sources):
        wanted = corpus.validation_documents
        chosen = _rows(db, f"{select} WHERE source = $1 ORDER BY name_hash, shard, position LIMIT {wanted}", name)
        _drop(db, chosen, "validation")
        held_out += sorted(chosen, key=lambda row: (row["shard"], row["position"]))
        (left,) = db.execute(f"SELECT count(*) {free} WHERE source = $1", [name]).fetchone() or (0,)
        if len(chosen) < wanted or not left or not probes:
            found = sum(shard["take"] for shard in shards if shard["source"] == name)
            skipped = sum((Counter(shard["skipped"]) for shard in shards if shard["source"] == name), Counter())
            reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            problems.append(
                f"source {name} has {found} usable documents{f' (skipped: {reasons})' if reasons else ''}, but"
                f" {wanted} validation documents, the probe and one to train on need {wanted + 2}"
            )
    if problems:
        raise CorpusError(corpus.name, problems)
    return probes[0], held_out


def _rows(db: duckdb.DuckDBPyConnection, query: str, value: str) -> list[dict[str, Any]]:
    names = ("shard", "position", "name", "source")
    return [dict(zip(names, row, strict=True)) for row in db.execute(query, [value]).fetchall()]


def _drop(db: duckdb.DuckDBPyConnection, rows: list[dict[str, Any]], role: str) -> None:
    for row in rows:
        db.execute("INSERT INTO dropped VALUES ($1, $2, $3)", [row["shard"], row["position"], role])
