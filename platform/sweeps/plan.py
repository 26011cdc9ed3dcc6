"""The plan of a study: which runs it has, what each will cost, and what of it the store holds already. Pure: nothing is
started, and nothing is written."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from haltscale.platform.config import ConfigError, RunConfig, current_identity, run_key
from haltscale.platform.corpora.tokenization import BytePairs
from haltscale.platform.initial_model import InitialModel
from haltscale.platform.llama import tokenizer_digest
from haltscale.platform.runs.branching import shortest_of_families
from haltscale.platform.store import Cause, RunState, RunStore, RunView, StoreError
from haltscale.platform.sweeps import planning, report
from haltscale.platform.sweeps.expansion import (
    Expansion,
    PlannedRun,
    PlanState,
    expand,
    stale_keys,
)
from haltscale.platform.sweeps.memory_plan import memory
from haltscale.platform.sweeps.planning import Measured
from haltscale.platform.sweeps.spec import COMPARISON, TUNING, StudySpec
from haltscale.platform.sweeps.stages import planned_runs


@dataclass(frozen=True, kw_only=True)
class StudyPlan(StudySpec):
    """A study with its runs, as far as its sweep and the store tell."""

    @cached_property
    def _expansion(self) -> Expansion:
        return expand(self.sweep, self.base, self.vocab_size, on_gpu=bool(self.execution.gpus_per_worker))

    @property
    def runs(self) -> list[RunConfig]:
        """The runs that the sweep names, cheapest first; tuned ones join them as their tuning runs finish, and controls
        as their subjects do.

        Raises:
            ConfigError: the sweep has errors; the message lists them all.
        """
        if self._expansion.problems:
            raise ConfigError(self._expansion.problems)
        return sorted(self._expansion.runs, key=self.flops_bound)

    def planned(self, store: RunStore | None = None) -> list[PlannedRun]:
        """All runs: tuning runs, then the others, both cheapest first, then what waits for a run to finish.

        Raises:
            ConfigError: the sweep has errors.
        """
        return self._planned(self._views(store or RunStore()))

    def _planned(self, views: Mapping[str, RunView]) -> list[PlannedRun]:
        if self._expansion.problems:
            raise ConfigError(self._expansion.problems)
        return planned_runs(
            self._expansion,
            views,
            key=self.key,
            cost=self.flops_bound,
            vocab_size=self.vocab_size,
            role=self.role,
        )

    def _views(self, store: RunStore) -> dict[str, RunView]:
        """All of the study's runs in the store, those of its earlier versions too; none where its name is invalid.

        By the key that the run has today, which for a record of an earlier schema is not its folder's name.
        """
        try:
            found = store.views(self.name, store.present(self.name))
        except StoreError:  # problems() tells it
            return {}
        renamed = {key: view for view in found.values() if (key := _key_today(view)) not in found}
        return {**{key: view for key, view in found.items() if view not in renamed.values()}, **renamed}

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
        if self.halving and self.role == COMPARISON:
            found.append("halving is for tuning: in a comparison every run trains to its end")
        if not len(self.sweep):
            found.append("the sweep is empty: give it at least one point, such as grid(size='0.6m')")
        found += self._expansion.problems
        found += [problem for target in self.targets for problem in target.problems()]
        found += self.corpus.problems()
        sound = self._expansion.alike if not self._expansion.problems else []
        if self.role == TUNING and self._expansion.tuned:
            found.append("tuned(...) tunes the arms of a comparison: leave it out of a study with role 'tuning'")
        execution = self.execution.problems(sound, cluster)
        found += execution
        room = (cluster or {}).get("node_memory", 0) if not self.execution.gpus_per_worker else 0
        needed: dict[str, tuple[float, str]] = {}
        for run in sound if room and not execution else []:
            own = memory(run, self.execution, self.vocab_size).total, run.label
            needed[run.size] = max(own, needed.get(run.size, own))
        for size, (most, label) in needed.items():
            if most > room:
                found.append(
                    f"size {size} needs {most / 1e9:.1f} GB on each worker ({label}), the largest node offers"
                    f" {room / 1e9:.1f} GB: lower micro_batch_sequences, set activation_checkpointing, or choose a"
                    " smaller size, more workers with zero_stage 3, or larger nodes"
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
        return run.identity(self.corpus.name, self.corpus_fingerprint)

    def key(self, run: RunConfig) -> str:
        """The run's key in the store."""
        return run_key(self.identity(run))

    def plan(self, store: RunStore | None = None) -> pd.DataFrame:
        """One row per run; nothing is started.

        Columns: ``run`` (label); ``key``; ``role`` (``comparison``, or ``tuning``); ``state``
        (:class:`~haltscale.platform.store.RunState`, ``stale`` or ``waiting``); ``method``; ``size``; ``parameters``;
        ``tokens``; ``flops_expected`` (realised training FLOPs: from the ledger where the method's depth is given,
        from finished runs of the same kind where a router decides, else missing); ``flops_bound`` (with every latent
        step taken); ``memory_bytes`` (of each worker, with every latent step taken; see
        :func:`~haltscale.platform.sweeps.memory_plan.memory`); ``seconds`` (at the speed of finished runs of the same
        method, size and execution in this study, else missing). Of a tuned run that waits, ``method`` to ``tokens``
        are known, and of a control that waits nothing but its label.

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
                waits = {"run": entry.label, "key": "", "role": entry.role, "state": str(PlanState.WAITING)}
                rows.append(waits | (self._sized(entry.expected) if entry.expected else {}))
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
                    "role": entry.role,
                    "state": str(state),
                    **self._sized(run),
                    "flops_expected": run.flops or (per_token * tokens if per_token and tokens else None),
                    "flops_bound": self.flops_bound(run),
                    "memory_bytes": memory(run, self.execution, self.vocab_size).total,
                    "seconds": measured.seconds(run, tokens),
                }
            )
        return pd.DataFrame(rows)

    def _sized(self, run: RunConfig) -> dict[str, Any]:
        """What a run is, whatever its recipe."""
        return {
            "method": str(run.method),
            "size": run.size,
            "parameters": run.parameters(self.vocab_size),
            "tokens": run.steps * run.batch_tokens if run.steps else None,
        }

    def status(self, store: RunStore | None = None) -> pd.DataFrame:
        """One row per run, also while another process trains them: ``run``, ``key``, ``role``, ``state``, ``step``,
        ``steps``, ``loss`` (nats per token), ``mean_steps``, ``seconds_left``, ``error``.

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
                "role": entry.role,
                "state": str(state),
            }
            row |= {name: shown.get(name) for name in ("step", "steps", "loss", "mean_steps", "seconds_left", "error")}
            rows.append(row)
        return pd.DataFrame(rows)

    def results(self, store: RunStore | None = None) -> pd.DataFrame:
        """One row per run of this study, finished or not; see :func:`haltscale.platform.sweeps.report.results`. Tuning
        runs of a comparison are not among them (:meth:`tuning`)."""
        return self._results(self._views(store or RunStore()))

    def tuning(self, store: RunStore | None = None) -> pd.DataFrame:
        """The same of the runs by which the arms of a comparison were tuned."""
        return self._results(self._views(store or RunStore()), role=TUNING)

    def _results(self, views: Mapping[str, RunView], *, role: str | None = None) -> pd.DataFrame:
        role = role or self.role
        keys = [self.key(entry.run) for entry in self._planned(views) if entry.run and entry.role == role]
        found = report.table([views.get(key) or RunView.absent(self.name, key) for key in keys])
        return found if len(found) else report.table([RunView.absent(self.name, "")]).head(0)

    def missing(self, store: RunStore, *, retry_failed: bool = False) -> dict[str, PlannedRun]:
        """What is to be trained now, by key, cheapest first: known, without a result, and not bound to fail again.

        Args:
            retry_failed: take those too that failed for a permanent reason.
        """
        return self._missing(self._views(store), retry_failed=retry_failed)

    def _missing(self, views: Mapping[str, RunView], *, retry_failed: bool = False) -> dict[str, PlannedRun]:
        planned = {self.key(entry.run): entry for entry in self._planned(views) if entry.run}
        return {
            key: entry
            for key, entry in planned.items()
            if key not in views or self._is_to_train(views[key], retry_failed=retry_failed)
        }

    def _is_to_train(self, view: RunView, *, retry_failed: bool) -> bool:
        match view.state:
            case RunState.FINISHED | RunState.STOPPED:
                return False
            case RunState.CAPPED:  # resumed where it may train for longer now
                limit, former = self.execution.max_hours, view.status.get("capped_hours")
                return retry_failed or limit is None or (isinstance(former, int | float) and limit > former)
            case RunState.DIVERGED | RunState.FAILED:
                return retry_failed or view.status.get("cause") != Cause.PERMANENT
            case _:
                return True

    def namesake(self, store: RunStore) -> str:
        """What is wrong where the store has another study of this name; else empty."""
        there = store.study(self.name)
        question, source = there.get("question"), there.get("source")
        if not source or not self.source or question == self.question or source == self.source:
            return ""
        return (
            f"the store has another study named {self.name!r} (from {source}: {question!r}): give this one, from"
            f" {self.source}, another name, or --adopt the runs of that one"
        )

    def document(self, corpus_counts: Mapping[str, Any], store: RunStore) -> dict[str, Any]:
        """``study.json``. ``controls`` names, for each control's key, its kind and its subject's key; ``tuning`` the
        keys of the tuning runs; ``waiting`` what is known when another run has finished: a control with its subject's
        key (empty where that waits too), or a run that is being tuned."""
        views = self._views(store)

        def folder(run: RunConfig) -> str:
            key = self.key(run)
            return views[key].key if key in views else key

        planned = self._planned(views)
        known = {folder(entry.run): entry for entry in planned if entry.run}
        controls = {
            key: {"kind": entry.control, "of": folder(entry.subject)}
            for key, entry in known.items()
            if entry.control and entry.subject
        }
        return {
            "name": self.name,
            "question": self.question,
            "note": self.note,
            "source": self.source,
            "targets": [target.document() for target in self.targets],
            "corpus": dict(corpus_counts),
            "runs": list(known),
            "controls": controls,
            "tuning": [key for key, entry in known.items() if entry.role == TUNING and self.role != TUNING],
            "waiting": [
                {"run": entry.label, "control": entry.control, "of": folder(entry.subject) if entry.subject else ""}
                for entry in planned
                if entry.run is None
            ],
            "planned_at": time.time(),
        }

    def ready(self, missing: Mapping[str, PlannedRun]) -> dict[str, PlannedRun]:
        """Of the missing runs, those that can start now: a branch waits for the run that it branches from."""
        if not self.execution.branch:
            return dict(missing)
        known = ((key, entry.run, self.identity(entry.run)) for key, entry in missing.items() if entry.run)
        free = shortest_of_families(known)
        return {key: entry for key, entry in missing.items() if key in free}


def _key_today(view: RunView) -> str:
    identity = current_identity(view.record)
    return run_key(identity) if identity else view.key
