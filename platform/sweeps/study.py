"""The study: a question, a corpus, a base run and a sweep. It expands, subtracts what is finished, and runs the rest.

Running a study again runs nothing; adding a value runs only what is new; a killed study goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import pandas as pd

from haltscale.platform.cluster import ClusterError
from haltscale.platform.config import ConfigError, RunConfig, apply_point, as_members
from haltscale.platform.corpora.corpus import Corpus
from haltscale.platform.corpora.tokenization import BytePairs
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.identity import run_key
from haltscale.platform.llama import InitialModel, tokenizer_digest
from haltscale.platform.store import RunState, RunStore, RunView, StoreError
from haltscale.platform.sweeps import planning, report
from haltscale.platform.sweeps.expansion import (
    Expansion,
    PlannedRun,
    PlanState,
    RunControl,
    control_run,
    expand,
    labels,
    stale_keys,
)
from haltscale.platform.sweeps.planning import Measured
from haltscale.platform.sweeps.sweep import Sweep
from haltscale.platform.training.branching import shortest_of_families

log = logging.getLogger(__name__)

Train = Callable[["Study", Mapping[str, PlannedRun], RunStore], None]
"""Trains some of a study's runs: :func:`haltscale.platform.sweeps.ray_tune.run_missing`."""


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Asynchronous successive halving (ASHA, arXiv 1810.05934): at growing shares of its budget a run goes on only if
    its held-out loss is among the best there. It looks at evaluations: give the execution enough of them."""

    first: float = 0.25
    """Share of the budget after which a run may be ended for the first time."""
    factor: int = 2
    """One run in so many goes on, and the next look is after so many times the share."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What to compare; how to run it follows."""

    name: str
    """Names the study's folder in the store."""
    question: str
    """What the study is to answer, in a sentence."""
    corpus: Corpus
    base: RunConfig
    """What all runs share."""
    sweep: Sweep
    """What differs: points that override the base's fields and its method's options."""
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    note: str = ""
    """Shown under the table of results: what these figures can and cannot say."""

    role: ClassVar[str] = "comparison"
    """What its runs are for; in each ``spec.json`` and ``record.json``."""
    halving: ClassVar[Halving | None] = None
    """First in, first out: in a comparison, nothing is ended early."""

    @cached_property
    def _expansion(self) -> Expansion:
        return expand(self.sweep, self.base, self.vocab_size)

    @cached_property
    def vocab_size(self) -> int:
        """The corpus's, asked once: a large tokenizer takes long to answer."""
        return self.corpus.vocab_size

    @cached_property
    def _fingerprint(self) -> str:
        return self.corpus.fingerprint

    @property
    def runs(self) -> list[RunConfig]:
        """The runs that the sweep names, cheapest first; controls join them as their subjects finish.

        Raises:
            ConfigError: the sweep has errors; the message lists them all.
        """
        if self._expansion.problems:
            raise ConfigError(self._expansion.problems)
        return sorted(self._expansion.runs, key=self.flops_bound)

    def planned(self, store: RunStore | None = None) -> list[PlannedRun]:
        """All runs, cheapest first, then the controls that wait for a run to finish.

        Raises:
            ConfigError: the sweep has errors.
        """
        return self._planned(self._views(store or RunStore()))

    def _planned(self, views: Mapping[str, RunView]) -> list[PlannedRun]:
        runs = self.runs
        controls: dict[RunConfig, RunControl] = {}
        waiting = []
        for control in self._expansion.controls:
            view = views.get(self.key(control.subject))
            run = control_run(control, view.record if view else {}, self.vocab_size)
            if run is None:
                waiting.append(control)
            elif run not in runs:  # two subjects may ask for the same control, or the sweep may have it already
                controls.setdefault(run, control)
        known = sorted([*runs, *controls], key=self.flops_bound)
        named = labels(known)
        found = []
        for run in known:
            mine = controls.get(run)
            kind, subject = (mine.kind, mine.subject) if mine else (None, None)
            found.append(PlannedRun(label=named[run], run=run, control=kind, subject=subject))
        for control in waiting:
            label = f"{control.kind} control of {named[control.subject]}"
            found.append(PlannedRun(label=label, run=None, control=control.kind, subject=control.subject))
        return found

    def _views(self, store: RunStore) -> dict[str, RunView]:
        """All of the study's runs in the store, those of its earlier versions too; none where its name is no name."""
        try:
            return store.views(self.name, store.present(self.name))
        except StoreError:  # problems() tells it
            return {}

    def flops_bound(self, run: RunConfig) -> float:
        """Realised training FLOPs with every latent step taken: what a run costs at most."""
        if run.flops is not None:
            return run.flops
        return planning.cost(run, self.vocab_size).bound * run.tokens

    def problems(
        self, cluster: Mapping[str, float] | None = None, views: Mapping[str, RunView] | None = None
    ) -> list[str]:
        """Everything that is wrong with the study, all at once.

        Args:
            cluster: what the cluster has (``CPU``, ``GPU``, ``node_memory``), where that is known.
            views: the study's runs in the store; those that cannot be read are problems.
        """
        found = []
        try:
            RunStore().path(self.name)
        except StoreError as error:
            found.append(str(error))
        if not len(self.sweep):
            found.append("the sweep is empty: give it at least one point, such as grid(size='0.6m')")
        found += self._expansion.problems
        found += self.corpus.problems()
        sound = self._expansion.runs if not self._expansion.problems else []
        execution = self.execution.problems(sound, cluster)
        found += execution
        room = (cluster or {}).get("node_memory", 0) if not self.execution.gpus_per_worker else 0
        for size in {run.size: run for run in sound if room and not execution}.values():
            needed = planning.memory_at_least(size, self.execution, self.vocab_size)
            if needed > room:
                found.append(
                    f"size {size.size} needs at least {needed / 1e9:.1f} GB on each worker, the largest node offers"
                    f" {room / 1e9:.1f} GB: choose a smaller size, more workers with zero_stage 3, or larger nodes"
                )
        for start in {run.init_from for run in sound if run.init_from}:
            found += [f"init_from {start.source}: {problem}" for problem in self._tokenizer_problems(start)]
        found += [f"{view.key}: {view.problem}" for view in (views or {}).values() if view.problem]
        return found

    def _tokenizer_problems(self, start: InitialModel) -> list[str]:
        """Whether the corpus is tokenised as the model that a run starts from reads it."""
        tokenizer = self.corpus.tokenizer
        advice = "name the model's own, tokenizer=Pretrained(name=...)"
        if isinstance(tokenizer, BytePairs):
            return [f"the corpus trains a tokenizer of its own: {advice}"]
        if tokenizer.problems() or tokenizer_digest(tokenizer.json) == start.tokenizer_sha256:
            return []
        return [f"its tokenizer is not the corpus's, {tokenizer.name!r}: {advice}"]

    def identity(self, run: RunConfig) -> dict[str, Any]:
        """Everything that makes the run's key."""
        return run.identity(self.corpus.name, self._fingerprint)

    def key(self, run: RunConfig) -> str:
        """The run's key in the store."""
        return run_key(self.identity(run))

    def plan(self, store: RunStore | None = None) -> pd.DataFrame:
        """One row per run; nothing is started.

        Columns: ``run`` (label); ``key``; ``state`` (:class:`~haltscale.platform.store.RunState`, ``stale`` or
        ``waiting``); ``method``; ``size``; ``parameters``; ``tokens``; ``flops_expected`` (realised training FLOPs:
        from the ledger where the method's depth is given, from finished runs of the same kind where a router decides,
        else missing); ``flops_bound`` (with every latent step taken); ``memory_bytes`` (of each worker, at least);
        ``seconds`` (at the speed of finished runs of the same method, size and execution in this study, else missing).

        Raises:
            ConfigError: the study has errors.
        """
        store = store or RunStore()
        views = self._views(store)
        if problems := self.problems(views=views):
            raise ConfigError(problems)
        planned = self._planned(views)
        keys = {entry.run: self.key(entry.run) for entry in planned if entry.run}
        stale = stale_keys(views, {key: self.identity(run) for run, key in keys.items()})
        measured = Measured(views.values(), self.execution)
        rows: list[dict[str, Any]] = []
        for entry in planned:
            run = entry.run
            if run is None:
                rows.append({"run": entry.label, "key": "", "state": str(PlanState.WAITING)})
                continue
            key = keys[run]
            view = views.get(key)
            state: str = view.state if view else RunState.PLANNED
            if key in stale and state == RunState.PLANNED:
                state = PlanState.STALE
            per_token = planning.cost(run, self.vocab_size).expected or measured.flops_per_token(run)
            tokens = run.steps * run.batch_tokens if run.steps else None
            rows.append(
                {
                    "run": entry.label,
                    "key": key,
                    "state": str(state),
                    "method": str(run.method),
                    "size": run.size,
                    "parameters": run.parameters(self.vocab_size),
                    "tokens": tokens,
                    "flops_expected": run.flops or (per_token * tokens if per_token and tokens else None),
                    "flops_bound": self.flops_bound(run),
                    "memory_bytes": planning.memory_at_least(run, self.execution, self.vocab_size),
                    "seconds": measured.seconds(run, tokens),
                }
            )
        return pd.DataFrame(rows)

    def status(self, store: RunStore | None = None) -> pd.DataFrame:
        """One row per run, also while another process trains them: ``run``, ``key``, ``state``, ``step``, ``steps``,
        ``loss`` (nats per token), ``mean_steps``, ``seconds_left``, ``error``.

        Raises:
            ConfigError: the sweep has errors.
        """
        views = self._views(store or RunStore())
        rows = []
        for entry in self._planned(views):
            view = views.get(self.key(entry.run)) if entry.run else None
            state = (view.state if view else RunState.PLANNED) if entry.run else PlanState.WAITING
            shown = view.status if view else {}
            row: dict[str, Any] = {
                "run": entry.label,
                "key": self.key(entry.run) if entry.run else "",
                "state": str(state),
            }
            row |= {name: shown.get(name) for name in ("step", "steps", "loss", "mean_steps", "seconds_left", "error")}
            rows.append(row)
        return pd.DataFrame(rows)

    def results(self, store: RunStore | None = None) -> pd.DataFrame:
        """One row per run of this study, finished or not; see :func:`haltscale.platform.sweeps.report.results`."""
        return self._results(self._views(store or RunStore()))

    def _results(self, views: Mapping[str, RunView]) -> pd.DataFrame:
        keys = [self.key(entry.run) for entry in self._planned(views) if entry.run]
        return report.table([views.get(key) or RunView.absent(self.name, key) for key in keys])

    def missing(self, store: RunStore) -> dict[str, PlannedRun]:
        """What is to be trained now, by key, cheapest first: known and without a result."""
        return self._missing(self._views(store))

    def _missing(self, views: Mapping[str, RunView]) -> dict[str, PlannedRun]:
        planned = {self.key(entry.run): entry for entry in self._planned(views) if entry.run}
        ended = {key for key, view in views.items() if view.state in (RunState.FINISHED, RunState.STOPPED)}
        return {key: entry for key, entry in planned.items() if key not in ended}

    def run(self, store: RunStore | None = None) -> pd.DataFrame:
        """Train what is missing and return the results.

        Connects to the Ray cluster that this process belongs to (a submitted job), else to the local head, else to a
        Ray of its own. A run that fails is tried again as often as the execution says, then recorded with its error,
        and the others go on. Controls are trained as soon as their subjects have finished.

        Raises:
            ConfigError: the study has errors, or runs in the store cannot be read; nothing was started.
            StudyBusyError: another process is running this study.
        """
        store = store or RunStore()
        views = self._views(store)  # read once: a thousand finished runs are thousands of files
        problems = self.problems(views=views)
        if problems or self._missing(views):
            from haltscale.platform.sweeps import ray_tune  # Ray takes seconds to import; a finished study needs none

            with ray_tune.connected() as cluster:
                if problems := self.problems(cluster, self._views(store)):
                    raise ConfigError(problems)
                with ray_tune.held(self.name):
                    self._train(store, ray_tune.run_missing)
            return self.results(store)
        results = self._results(views)
        log.info("%s: all %d runs are finished, nothing to train", self.name, len(results))
        return results

    def _train(self, store: RunStore, train: Train) -> None:
        """Train what is missing; what that makes known is the next stage."""
        tried: set[str] = set()
        while left := {key: entry for key, entry in self.missing(store).items() if key not in tried}:
            now = left
            if self.execution.branch:
                known = ((key, entry.run, self.identity(entry.run)) for key, entry in left.items() if entry.run)
                free = shortest_of_families(known)
                now = {key: entry for key, entry in left.items() if key in free}
            planned = self.planned(store)
            waiting = sum(entry.run is None for entry in planned)
            log.info(
                "%s: %d of %d runs are finished, %d to train%s",
                self.name,
                len(planned) - waiting - len(left),
                len(planned) - waiting,
                len(left),
                f", {waiting} controls wait for them" if waiting else "",
            )
            train(self, now, store)
            tried |= set(now)

    def document(self, corpus_counts: Mapping[str, Any], store: RunStore) -> dict[str, Any]:
        """``study.json``. ``controls`` names, for each control's key, its kind and its subject's key."""
        known = {self.key(entry.run): entry for entry in self.planned(store) if entry.run}
        controls = {
            key: {"kind": entry.control, "of": self.key(entry.subject)}
            for key, entry in known.items()
            if entry.control and entry.subject
        }
        return {
            "name": self.name,
            "question": self.question,
            "note": self.note,
            "corpus": dict(corpus_counts),
            "runs": list(known),
            "controls": controls,
            "planned_at": time.time(),
        }

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The command line of a study's module: run it, or show its plan; exits with 1 where something failed."""
        parser = argparse.ArgumentParser(
            description=self.question,
            epilog="example: --dry-run --set tokens=100000 shows what shorter runs would be and starts nothing",
        )
        parser.add_argument("--store", help="root of the run store: a folder or an fsspec URL")
        parser.add_argument("--dry-run", action="store_true", help="show what would run and stop")
        parser.add_argument(
            "--json", action="store_true", help="print the table as JSON, and everything else to stderr"
        )
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="override a field of the base run or of the execution for all runs, e.g. --set tokens=100000",
        )
        options = parser.parse_args(arguments)
        stream = sys.stderr if options.json else sys.stdout
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=stream, force=True)
        try:
            study = self.overridden(options.set)
            store = RunStore(options.store)
            if options.dry_run:
                report.show_plan(study.plan(store), title=f"{study.name}: the plan", as_json=options.json)
                return
            results = study.run(store)
        except (ConfigError, StoreError, StudyBusyError, ClusterError, ModuleNotFoundError) as error:
            sys.exit(f"error: {error}")
        except KeyboardInterrupt:
            log.info("interrupted: finished runs are kept, begun ones go on from their last checkpoint next time")
            sys.exit(130)
        report.show_results(results, title=study.name, note=study.note, as_json=options.json)
        states = study.status(store)["state"]
        if unfinished := int((~states.isin([RunState.FINISHED, RunState.STOPPED])).sum()):
            sys.exit(f"{unfinished} of {len(states)} runs have no result; submit the study again to go on")

    def overridden(self, assignments: Sequence[str]) -> Study:
        """This study with ``field=value`` assignments applied to the base run or the execution.

        Raises:
            ConfigError: an assignment has no known field or no readable value.
        """
        base, execution, problems = self.base, self.execution, []
        for assignment in assignments:
            name, _, text = assignment.partition("=")
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            if name in {f.name for f in fields(execution)}:
                execution = replace(execution, **as_members(ExecutionConfig, {name: value}))
                continue
            base, found = apply_point(base, {name: value})
            problems += [f"--set {assignment}: {problem}" for problem in found]
        if problems:
            raise ConfigError(problems)
        return replace(self, base=base, execution=execution)


class StudyBusyError(RuntimeError):
    """Another process is running the study; the message says which."""
