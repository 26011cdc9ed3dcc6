"""The study: a question, a corpus, a base run and a sweep. It expands, subtracts what is finished, and runs the rest.

Running a study again runs nothing; adding a value runs only what is new; a killed study goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import pandas as pd

from haltscale.model import METHODS, SIZES, paper_training_flops
from haltscale.platform import report
from haltscale.platform.cluster import ClusterError
from haltscale.platform.config import ConfigError, RunConfig, apply_point, as_members
from haltscale.platform.corpus import Corpus
from haltscale.platform.execution import ExecutionConfig
from haltscale.platform.store import RunState, RunStore, StoreError
from haltscale.platform.sweep import Sweep

log = logging.getLogger(__name__)


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

    @cached_property
    def _expanded(self) -> tuple[list[RunConfig], list[str]]:
        runs, problems = [], []
        for index, point in enumerate(self.sweep):
            run, found = apply_point(self.base, point)
            found = found or run.problems(self.corpus.vocab_size)
            problems += [f"point {index + 1} {point}: {problem}" for problem in found]
            runs.append(run)
        seen: dict[RunConfig, int] = {}
        for index, run in enumerate(runs if not problems else []):
            if run in seen:
                problems.append(f"point {index + 1} is the same run as point {seen[run] + 1}: {run.label}")
            seen.setdefault(run, index)
        return sorted(runs, key=self.planned_flops) if not problems else runs, problems

    @property
    def runs(self) -> list[RunConfig]:
        """The runs, cheapest first.

        Raises:
            ConfigError: the sweep has errors; the message lists them all.
        """
        runs, problems = self._expanded
        if problems:
            raise ConfigError(problems)
        return runs

    def planned_flops(self, run: RunConfig) -> float:
        """Upper estimate of a run's training FLOPs (its budget, or the paper's convention at full depth), for order and
        time left."""
        if run.flops is not None:
            return run.flops
        parameters = SIZES[run.size].parameters(self.corpus.vocab_size)
        return paper_training_flops(parameters, run.tokens, METHODS[run.method].max_passes(run.options))

    def problems(self, cluster: Mapping[str, float] | None = None) -> list[str]:
        """Everything that is wrong with the study, all at once.

        Args:
            cluster: what the cluster has (``CPU``, ``GPU``), where that is known.
        """
        found = []
        try:
            RunStore().path(self.name)
        except StoreError as error:
            found.append(str(error))
        runs, sweep_problems = self._expanded
        if not runs:
            found.append("the sweep is empty: give it at least one point, such as grid(size='0.6m')")
        found += sweep_problems
        found += self.corpus.problems()
        found += self.execution.problems(runs if not sweep_problems else [], cluster)
        return found

    def key(self, run: RunConfig) -> str:
        """The run's key in the store."""
        return run.key(self.corpus.name, self.corpus.fingerprint)

    def plan(self, store: RunStore | None = None) -> pd.DataFrame:
        """One row per run: label, key, state, parameters, tokens, planned FLOPs.

        Raises:
            ConfigError: the study has errors.
        """
        if problems := self.problems():
            raise ConfigError(problems)
        store = store or RunStore()
        rows = []
        for run in self.runs:
            key = self.key(run)
            rows.append(
                {
                    "run": run.label,
                    "key": key,
                    "state": str(store.run(self.name, key).state),
                    "parameters": SIZES[run.size].parameters(self.corpus.vocab_size),
                    "tokens": None if run.steps is None else run.steps * run.batch_tokens,
                    "planned_flops": self.planned_flops(run),
                }
            )
        return pd.DataFrame(rows)

    def results(self, store: RunStore | None = None) -> pd.DataFrame:
        """One row per run of this study, finished or not; see :func:`haltscale.platform.report.results`."""
        return report.results(store or RunStore(), self.name, [self.key(run) for run in self.runs])

    def run(self, store: RunStore | None = None) -> pd.DataFrame:
        """Train what is missing and return the results.

        Connects to the Ray cluster that this process belongs to (a submitted job), else to the local head, else to a
        Ray of its own.

        Raises:
            ConfigError: the study has errors; nothing was started.
            StoreError: a run's folder is damaged or of another schema version.
            StudyBusyError: another process is running this study.
        """
        store = store or RunStore()
        problems = self.problems()
        keys = {} if problems else {self.key(run): run for run in self.runs}
        views = {key: store.run(self.name, key) for key in keys}
        if damaged := [f"{key}: {view.problem}" for key, view in views.items() if view.problem]:
            raise StoreError("these runs cannot be read, and are not trained over:\n" + "\n".join(damaged))
        finished = {key for key, view in views.items() if view.state is RunState.FINISHED}
        missing = {key: run for key, run in keys.items() if key not in finished}
        if problems or missing:
            from haltscale.platform import ray_tune  # Ray takes seconds to import; a finished study needs none

            with ray_tune.connected() as cluster:
                if problems := self.problems(cluster):
                    raise ConfigError(problems)
                log.info(
                    "%s: %d of %d runs are finished, %d to train", self.name, len(finished), len(keys), len(missing)
                )
                ray_tune.run_missing(self, missing, store)
        else:
            log.info("%s: all %d runs are finished, nothing to train", self.name, len(keys))
        return self.results(store)

    def document(self, corpus_counts: Mapping[str, Any]) -> dict[str, Any]:
        """``study.json``."""
        return {
            "name": self.name,
            "question": self.question,
            "note": self.note,
            "corpus": dict(corpus_counts),
            "runs": [self.key(run) for run in self.runs],
            "planned_at": time.time(),
        }

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The command line of a study's module: run it, or show its plan; exits with 1 where something failed."""
        parser = argparse.ArgumentParser(description=self.question)
        parser.add_argument("--store", help="root of the run store: a folder or an fsspec URL")
        parser.add_argument("--dry-run", action="store_true", help="show what would run and stop")
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="override a field of the base run or of the execution for all runs, e.g. --set tokens=100000",
        )
        options = parser.parse_args(arguments)
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
        try:
            study = self.overridden(options.set)
            store = RunStore(options.store)
            if options.dry_run:
                report.show(study.plan(store), title=f"{study.name}: the plan")
                return
            results = study.run(store)
        except (ConfigError, StoreError, StudyBusyError, ClusterError, ModuleNotFoundError) as error:
            sys.exit(f"error: {error}")
        report.show_results(results, title=study.name, note=study.note)
        unfinished = results[results["state"] != RunState.FINISHED]
        if len(unfinished):
            sys.exit(f"{len(unfinished)} of {len(results)} runs have no result; submit the study again to go on")

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
