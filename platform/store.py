"""The run store: plain files under one root, nothing else to run.

    <root>/<study>/
        study.json                 what the study asks, its runs in order, when it was planned
        <run_key>/
            spec.json              what the run is: identity (makes the key) and execution (does not)
            status.json            how it is going: state, step, time left, error
            .lease/                the process that trains it, and its heartbeat (see lease.py); a study has one too
            attempts.jsonl         one line each time the run starts or resumes: after which step, on which nodes
            metrics.jsonl          one line per logged training step
            evaluations.jsonl      one line per evaluation on held-out documents
            halting/probe-<step>.parquet   every token of the probe text, one file per evaluation
            halting/events-<step>.parquet  every token of the validation split (telemetry.py names the columns)
            halting/cube-<step>.parquet    those tokens counted by steps, surprisal, position, frequency and look
            halting/summary-<step>.json    what they say about halting; written after the other two
            checkpoints/           training checkpoints, one folder a step, one shard a rank (see checkpoints.py)
            evaluations/<name>.json        later evaluations of the finished model: tasks, controls, dial, corpora
            evaluations/step-<step>/<name>.json    the same of a training checkpoint
            model/                 the finished model: safetensors, its config, tokenizer, tokenizer_config.json
            record.json            the result; written last and atomically. A run without it is unfinished.

The root is a local folder or any fsspec URL (``s3://bucket/runs``). Every JSON document carries ``schema``; a reader
refuses a document of another schema version instead of guessing. This module imports neither Ray nor torch, so that
a reader (the dashboard, a notebook) starts fast.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd

from haltscale.platform.documents import (
    NOTHING,
    RUN,
    SCHEMA_VERSION,
    advice,
    checked,
    parse_document,
    parse_lines,
)
from haltscale.platform.documents import (
    StoreError as StoreError,  # handed on
)
from haltscale.platform.durable import write_durably
from haltscale.platform.lease import Holder, holder_of, modified

STALL_SECONDS = 120.0
"""A run that calls itself running but has given no sign of life for this long is shown as stalled."""

PART_BYTES = 1 << 18
"""On an object store, a JSON-lines file continues in a new part when its last one is this long."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def is_name(text: str) -> bool:
    """Whether a study or a run can be called so."""
    return _NAME.fullmatch(text) is not None


class RunState(StrEnum):
    """Where a run stands, derived from what its folder holds."""

    PLANNED = "planned"
    RUNNING = "running"
    STALLED = "stalled"
    FAILED = "failed"
    """Without a result, for a reason that ``cause`` in its status calls transient (tried again when the study is run
    again) or permanent (not tried again)."""
    DIVERGED = "diverged"
    """Ended by its own numbers: a loss that is not finite, or one that the policy stops. It would diverge again."""
    CAPPED = "capped"
    """Ended by the limit on its training time; a higher limit resumes it."""
    STOPPED = "stopped"
    """Ended early by a tuning study's scheduler; it is not run again."""
    FINISHED = "finished"


class Cause(StrEnum):
    """Why a run has no result, as far as trying again is concerned."""

    PERMANENT = "permanent"
    TRANSIENT = "transient"


ENDED = (RunState.FAILED, RunState.DIVERGED, RunState.CAPPED, RunState.STOPPED)
"""Of a run that is over without a result."""


def haltscale_home() -> Path:
    """The folder for everything haltscale keeps: ``$HALTSCALE_HOME``, else ``~/haltscale``.

    It does not depend on the working directory, because Ray runs jobs and workers in folders of its own.
    """
    return Path(os.environ.get("HALTSCALE_HOME") or Path.home() / "haltscale").expanduser().absolute()


def default_root() -> str:
    """The store's root: ``$HALTSCALE_STORE`` (a path or an fsspec URL), else ``<haltscale_home>/runs``."""
    return os.environ.get("HALTSCALE_STORE") or str(haltscale_home() / "runs")


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One run as a reader sees it; fields that its folder does not hold (yet) are empty."""

    study: str
    key: str
    state: RunState
    spec: Mapping[str, Any]
    """``spec.json``: ``label``, ``identity``, ``execution``."""
    status: Mapping[str, Any]
    """``status.json``: ``state``, ``step``, ``steps``, ``seconds_left``, ``error``, ``cause``."""
    record: Mapping[str, Any]
    """``record.json``; empty until the run is finished."""
    problem: str = ""
    """Why the folder could not be read in full; empty when it could."""
    silent_seconds: float | None = None
    """Since the last sign of life of a run that is running or stalled."""

    @property
    def label(self) -> str:
        return str(self.spec.get("label") or self.key)

    @classmethod
    def absent(cls, study: str, key: str) -> RunView:
        """A run that has no folder."""
        return cls(study=study, key=key, state=RunState.PLANNED, spec={}, status={}, record={})


class RunStore:
    """Reads and writes the store. Paths inside it are built here and nowhere else."""

    def __init__(self, root: str | Path | None = None) -> None:
        root = str(root or default_root())
        # Workers and jobs run in folders of their own: a local root must not depend on the working directory.
        try:
            self.root = root if "://" in root else str(Path(root).expanduser().absolute())
        except RuntimeError as error:  # no such user
            raise StoreError(f"{root}: {error}") from error
        try:  # other processes write too: a listing is never remembered
            self.fs, self._base = fsspec.core.url_to_fs(self.root, use_listings_cache=False)
        except ImportError as error:
            raise StoreError(f"{self.root}: {error}; for s3:// that is pip install 'haltscale[s3]'") from error
        except ValueError as error:
            raise StoreError(f"{self.root} is neither a folder nor a URL that fsspec supports: {error}") from error
        self._whole_objects = "file" not in self.fs.protocol

    @property
    def is_local(self) -> bool:
        """Whether the store is a folder of a filesystem, and not an object store."""
        return not self._whole_objects

    # ---- paths ----------------------------------------------------------------------------------------------------

    def path(self, study: str, key: str | None = None, *parts: str) -> str:
        """The path of a study, a run or a file inside it, on this store's filesystem.

        Raises:
            StoreError: a name could leave the store (a slash, ``..``, an empty name).
        """
        for name in (study, key):
            if name is not None and not _NAME.fullmatch(name):
                raise StoreError(f"{name!r} is not a valid study or run name: use letters, digits, '-', '_' and '.'")
        return "/".join([self._base.rstrip("/"), study, *([key] if key else []), *parts])

    def local_path(self, study: str, key: str, *parts: str) -> Path:
        """Like :meth:`path`, for code that needs a real folder.

        Raises:
            StoreError: the store is not on a local filesystem.
        """
        if self._whole_objects:
            raise StoreError(f"{self.root} is not a local folder")
        return Path(self.path(study, key, *parts))

    # ---- writing --------------------------------------------------------------------------------------------------

    def write_json(self, path: str, document: Mapping[str, Any]) -> None:
        """Write a JSON document so that a reader sees the old one or the new one, never half of one."""
        self._write_text(path, json.dumps({"schema": SCHEMA_VERSION, **document}, indent=1, allow_nan=False))

    def _write_text(self, path: str, text: str) -> None:
        if self._whole_objects:  # an object store shows an object when all of it has arrived, and has no folders
            self.fs.pipe_file(path, text.encode())
            return
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        write_durably(path, text.encode())

    def append_lines(self, path: str, rows: list[Mapping[str, Any]]) -> None:
        """Append rows to a JSON-lines file; one process writes it.

        Object stores cannot append. There the last part is rewritten, and when it has grown to ``PART_BYTES`` the
        next rows go to a new one (``metrics.jsonl``, ``metrics.jsonl.00001``, ...), so that a row costs the same at the
        end of a run as at its beginning.
        """
        added = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()
        if not self._whole_objects:
            self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            with self.fs.open(path, "ab") as file:
                file.write(added)
            return
        parts = self._parts(path) or [path]
        before = self.fs.cat_file(parts[-1]) if self.fs.exists(parts[-1]) else b""
        if len(before) >= PART_BYTES:
            last = parts[-1].rsplit(".", 1)[1]  # the first part has no number
            parts, before = [*parts, f"{path}.{int(last) + 1 if last.isdigit() else 1:05d}"], b""
        self.fs.pipe_file(parts[-1], before + added)

    def truncate_lines(self, path: str, *, after_step: int) -> None:
        """Drop the rows written after ``after_step``: a resumed run writes them again."""
        for part in reversed(self._parts(path)):  # the last first: a death between two leaves no gap
            rows = [row for row in parse_lines(self.fs.cat_file(part)) if row["step"] <= after_step]
            if rows or part == path:
                self._write_text(part, "".join(json.dumps(row) + "\n" for row in rows))
            else:
                self.fs.rm_file(part)

    def _parts(self, path: str) -> list[str]:
        """The files of a JSON-lines file that exist, in order; see :meth:`append_lines`."""
        if not self._whole_objects:
            return [path] if self.fs.exists(path) else []
        folder = path.rsplit("/", 1)[0]
        try:
            names = [str(entry).rstrip("/") for entry in self.fs.ls(folder, detail=False)]
        except FileNotFoundError:
            return []
        stem = path.lstrip("/")
        return sorted(name for name in names if re.fullmatch(rf"{re.escape(stem)}(\.\d{{5}})?", name.lstrip("/")))

    # ---- reading --------------------------------------------------------------------------------------------------

    def read_json(self, path: str) -> dict[str, Any]:
        """Read a JSON document; an absent one is ``{}``.

        Raises:
            StoreError: the document is damaged, of another schema version, or cannot be read.
        """
        try:
            return parse_document(path, self.fs.cat_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error}); {advice(path)}") from error

    def read_lines(self, path: str) -> list[dict[str, Any]]:
        """Read a JSON-lines file: the objects in it. A last line still being written is left for the next read, and a
        folder in the file's place has none."""
        try:
            if not self._whole_objects:
                return parse_lines(self.fs.cat_file(path))
            return [row for part in self._parts(path) for row in parse_lines(self.fs.cat_file(part))]
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return []

    def studies(self) -> list[str]:
        """Names of the studies in the store, sorted."""
        if not self.fs.isdir(self._base):
            return []
        names = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(self._base, detail=True)]
        return sorted(
            name for name in names if _NAME.fullmatch(name) and self.fs.exists(self.path(name, None, "study.json"))
        )

    def no_study(self, name: str) -> StoreError:
        """The error about a study that is not in the store; it lists those that are."""
        return StoreError(f"no study {name!r} in {self.root}; available: {', '.join(self.studies()) or 'none'}")

    def study(self, name: str) -> dict[str, Any]:
        """``study.json``: ``name``, ``question``, ``corpus``, ``runs`` (keys in the order of the study). Fields of
        another type than they should have are left out; :meth:`study_problem` names them.

        Raises:
            StoreError: the document is damaged, of another schema version, or cannot be read.
        """
        return dict(checked("study", self.read_json(self.path(name, None, "study.json")))[0])

    def study_problem(self, name: str) -> str:
        """Why ``study.json`` cannot be read in full; empty where it can. What it does not say is then unknown; the
        runs are there all the same, in the order of their keys."""
        path = self.path(name, None, "study.json")
        try:
            odd = checked("study", self.read_json(path))[1]
        except StoreError as error:
            return str(error)
        return f"{path}: {odd}; {advice(path)}" if odd else ""

    def run(self, study: str, key: str, *, now: float | None = None) -> RunView:
        """One run; a folder that cannot be read becomes a view with ``problem`` set, never an exception."""
        return self.views(study, [key], now=now)[key]

    def views(self, study: str, keys: Iterable[str], *, now: float | None = None) -> dict[str, RunView]:
        """Several runs by key; one that cannot be read, or whose key is invalid, is a view with ``problem`` set."""
        kept = list(dict.fromkeys(keys))
        named = [key for key in kept if _NAME.fullmatch(key)]
        paths = {(key, name): self.path(study, key, f"{name}.json") for key in named for name in RUN}
        found = self._read_documents(paths)
        views = {}
        for key in kept:
            documents: dict[str, Any] = {}
            problems = [] if key in named else [f"{key!r} is not a valid run key: submit the study again"]
            for name in RUN:
                content = found.get((key, name), NOTHING)
                if isinstance(content, StoreError):
                    problems.append(str(content))
                    content = NOTHING
                documents[name], odd = checked(name, content)
                if odd:
                    problems.append(f"{name}.json of {key}: {odd}")
            state = run_state(documents["status"], documents["record"])
            view = RunView(study=study, key=key, state=state, problem="; ".join(problems), **documents)
            views[key] = self.alive(view, now=now)
        return views

    def _read_documents(self, paths: Mapping[Any, str]) -> dict[Any, Mapping[str, Any] | StoreError]:
        """Documents by whatever names their paths; read together, since object stores answer many requests at once."""
        if not paths:
            return {}
        wanted = list(paths.values())
        contents = self.fs.cat_ranges(wanted, [None] * len(wanted), [None] * len(wanted), on_error="return")
        found: dict[Any, Mapping[str, Any] | StoreError] = {}
        for (name, path), content in zip(paths.items(), contents, strict=True):
            try:
                if isinstance(content, FileNotFoundError | NotADirectoryError):
                    found[name] = NOTHING
                elif isinstance(content, BaseException):
                    raise StoreError(f"{path} cannot be read ({content}); {advice(path)}")
                else:
                    found[name] = parse_document(path, content)
            except StoreError as error:
                found[name] = error
        return found

    def holder(self, study: str, key: str | None = None, *, now: float | None = None) -> Holder | None:
        """The process that owns a study or trains a run, or the last one that did; None where none ever did."""
        return holder_of(self, self.path(study, key), now=now)

    def alive(self, view: RunView, *, now: float | None = None) -> RunView:
        """The view of a run that calls itself running, with how long it has been silent: as stalled where too long, or
        where its process is gone. By the store's clock and ours, never by that of the machine that trains it."""
        if view.state is not RunState.RUNNING:
            return view
        holder = self.holder(view.study, view.key, now=now)
        if holder is not None:
            silent, gone = holder.silent_seconds, holder.is_released or holder.is_gone
        else:  # a run of an earlier version: its status was its sign of life
            try:
                written = modified(self.fs.info(self.path(view.study, view.key, "status.json")))
            except FileNotFoundError:
                return view
            silent, gone = (time.time() if now is None else now) - written, False
        state = RunState.STALLED if gone or silent > STALL_SECONDS else RunState.RUNNING
        return replace(view, state=state, silent_seconds=silent)

    def present(self, study: str) -> list[str]:
        """Keys of all runs that have a folder, sorted, whatever the study's document says."""
        try:
            entries = self.fs.ls(self.path(study), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"]
        return sorted(name for name in names if _NAME.fullmatch(name))

    def run_keys(self, study: str) -> list[str]:
        """Keys of a study's runs, in its order; runs of earlier versions of the study come last. Where ``study.json``
        cannot be read, all that are there (:meth:`study_problem` says why)."""
        try:
            planned = list(dict.fromkeys(self.study(study).get("runs", [])))
        except StoreError:
            planned = []
        others = sorted(set(self.present(study)) - set(planned))
        views = self.views(study, others)
        return [*planned, *(key for key in others if views[key].spec or views[key].problem)]

    def runs(self, study: str) -> Iterator[RunView]:
        """The runs of a study, in the order of :meth:`run_keys`."""
        yield from self.views(study, self.run_keys(study)).values()

    def finished_keys(self, study: str) -> set[str]:
        """Keys of the runs that have a record."""
        return {run.key for run in self.runs(study) if run.state is RunState.FINISHED}

    def metrics(self, study: str, key: str) -> pd.DataFrame:
        """Training metrics: one row per logged step."""
        return pd.DataFrame(self.read_lines(self.path(study, key, "metrics.jsonl")))

    def evaluations(self, study: str, key: str) -> pd.DataFrame:
        """Held-out evaluations: one row per evaluated step."""
        return pd.DataFrame(self.read_lines(self.path(study, key, "evaluations.jsonl")))

    def put_file(self, file: Path, path: str) -> None:
        """Copy a local file into the store, so that a reader sees the whole of it or nothing."""
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        if self.is_local:
            write_durably(path, file)
        else:  # an object appears when all of it has arrived
            self.fs.put_file(str(file), path)

    def _halting_steps(self, study: str, key: str, name: str) -> list[int]:
        folder = self.path(study, key, "halting")
        if not self.fs.isdir(folder):
            return []
        names = [path.rsplit("/", 1)[-1] for path in self.fs.ls(folder, detail=False)]
        return sorted(int(m.group(1)) for file in names if (m := re.fullmatch(rf"{name}-(\d+)\.(parquet|json)", file)))

    def probe_steps(self, study: str, key: str) -> list[int]:
        """Training steps at which the probe text was read, ascending."""
        return self._halting_steps(study, key, "probe")

    def halting_steps(self, study: str, key: str) -> list[int]:
        """Training steps with events, cube and summary of the validation split, ascending."""
        return self._halting_steps(study, key, "summary")

    def halting_path(self, study: str, key: str, name: str, step: int) -> str:
        """Path of the ``events``, ``cube``, ``summary`` or ``probe`` of a training step; DuckDB reads the tables."""
        ending = "json" if name == "summary" else "parquet"
        return self.path(study, key, "halting", f"{name}-{step:08d}.{ending}")

    def probe_path(self, study: str, key: str, step: int) -> str:
        """Path of the probe's events at a training step."""
        return self.halting_path(study, key, "probe", step)

    def probe(self, study: str, key: str, step: int) -> pd.DataFrame:
        """Per-token events on the probe text: one row per emitted token, in reading order.

        Columns: ``position``; ``token_id``; ``text`` (what the token adds to the text); ``steps`` (latent steps
        executed before it was emitted); ``expected_steps`` (under the exit masses); ``reach`` and ``exit``
        (lists of l_max+1 masses); ``nll`` (nats, of this token given what stands before it); ``entropy`` (nats, of
        the distribution over this token) and ``confidence`` (the greatest probability in it); ``correct`` (whether the
        token had that probability); ``frequency`` (0 the most frequent tokens to 9 the rarest); ``token_class``;
        ``nll_by_step`` and ``entropy_by_step`` (lists over the executed steps: had the position stopped after each;
        the last is the token's own; null for methods without a latent chain).
        """
        return self._table(self.probe_path(study, key, step))

    def halting_events(self, study: str, key: str, step: int, columns: list[str] | None = None) -> pd.DataFrame:
        """Every token of the validation split, in reading order; ``telemetry.EVENT_COLUMNS`` says what the columns are.

        Args:
            columns: to read; all by default. A long split's file is better read with DuckDB, at :meth:`halting_path`.
        """
        return self._table(self.halting_path(study, key, "events", step), columns)

    def halting_cube(self, study: str, key: str, step: int) -> pd.DataFrame:
        """The validation split's tokens counted by cell: ``steps``, ``surprisal`` (decile, 0 the best predicted),
        ``position_from`` (first place in the context window of the bin: 0, 1, 2, 4, ...), ``frequency``,
        ``token_class``; ``tokens``; and ``<measure>_sum``, ``<measure>_sum2`` (sum of squares) of nll, entropy,
        expected_steps, router_entropy, confidence and correct, so that means and their errors follow for any
        roll-up."""
        return self._table(self.halting_path(study, key, "cube", step))

    def halting_summary(self, study: str, key: str, step: int) -> dict[str, Any]:
        """What the cube and the events say (see ``halting_summary.summarise_halting``); ``{}`` where there is none."""
        return self.read_json(self.halting_path(study, key, "summary", step))

    def evaluation_path(self, study: str, key: str, name: str, step: int | None = None) -> str:
        """Path of a later evaluation: a task, ``controls``, ``dial``, ``held-out-<corpus>``.

        Args:
            step: of the training checkpoint that was evaluated; None for the finished model.

        Raises:
            StoreError: the name could leave the store.
        """
        if not _NAME.fullmatch(name):
            raise StoreError(f"{name!r} is not a valid evaluation name: use letters, digits, '-', '_' and '.'")
        return f"{self._evaluations(study, key, step)}/{name}.json"

    def _evaluations(self, study: str, key: str, step: int | None) -> str:
        return self.path(study, key, "evaluations", *([] if step is None else [f"step-{step:08d}"]))

    def later_evaluations(self, study: str, key: str, step: int | None = None) -> dict[str, dict[str, Any]]:
        """The later evaluations of the finished model, or of a step's checkpoint, by name: what ``haltscale evaluate``
        printed as JSON. One that cannot be read says why under ``problem``."""
        folder = self._evaluations(study, key, step)
        if not self.fs.isdir(folder):
            return {}
        paths = sorted(path for path in self.fs.ls(folder, detail=False) if path.endswith(".json"))
        names = {path.rsplit("/", 1)[-1].removesuffix(".json"): path for path in paths}
        return {
            name: {"problem": str(document)} if isinstance(document, StoreError) else dict(document)
            for name, document in self._read_documents(names).items()
        }

    def evaluated_steps(self, study: str, key: str) -> list[int]:
        """Steps whose training checkpoints have later evaluations, ascending."""
        folder = self._evaluations(study, key, None)
        if not self.fs.isdir(folder):
            return []
        found = (re.fullmatch(r"step-(\d+)", path.rsplit("/", 1)[-1]) for path in self.fs.ls(folder, detail=False))
        return sorted(int(match[1]) for match in found if match)

    def _table(self, path: str, columns: list[str] | None = None) -> pd.DataFrame:
        with self.fs.open(path, "rb") as file:
            return pd.read_parquet(file, columns=columns)


def run_state(status: Mapping[str, Any], record: Mapping[str, Any]) -> RunState:
    """What a run's documents say of it; whether a running one still lives, its lease says."""
    if record:
        return RunState.FINISHED
    state = status.get("state")
    return RunState(state) if state in (*ENDED, RunState.RUNNING) else RunState.PLANNED
