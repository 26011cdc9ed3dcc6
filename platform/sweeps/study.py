"""The study as its author uses it: define it, plan it, run it.

Running a study again runs nothing; adding a value runs only what is new; an interrupted study resumes.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import pandas as pd

from haltscale.platform.cluster import submission_id
from haltscale.platform.config import ConfigError
from haltscale.platform.lease import Lease, LeaseHeldError
from haltscale.platform.store import RunState, RunStore, RunView
from haltscale.platform.sweeps import study_cli
from haltscale.platform.sweeps.plan import StudyPlan
from haltscale.platform.sweeps.study_cli import StudyBusyError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Study(StudyPlan):
    """A question, a corpus, a base run and a sweep; see :class:`~haltscale.platform.sweeps.spec.StudySpec`."""

    def run(self, store: RunStore | None = None, *, retry_failed: bool = False, adopt: bool = False) -> pd.DataFrame:
        """Train what is missing and return the results.

        Connects to the Ray cluster that this process belongs to (a submitted job), else to the local head, else to a
        Ray of its own. A run that fails is tried again as often as the execution says, then recorded with its error,
        and the others continue. Controls are trained as soon as their subjects have finished.

        Args:
            retry_failed: try runs again that diverged or were refused.
            adopt: take over the runs of another study of the same name.

        Raises:
            ConfigError: the study has errors, or runs in the store cannot be read; nothing was started.
            StudyBusyError: another process is running this study.
        """
        store = store or RunStore()
        views = self._views(store)  # read once: a thousand finished runs are thousands of files
        problems = self.problems(views=views)
        if not problems and not adopt and (namesake := self.namesake(store)):
            problems = [namesake]
        if problems:
            self._refuse(problems, views)
        if self._missing(views, retry_failed=retry_failed):
            with self._owned(store):
                self._train(store, retry_failed=retry_failed, adopt=adopt)
            return self.results(store)
        planned = [entry for entry in self._planned(views) if entry.role == self.role]
        states = [views[key].state if (key := self.key(entry.run)) in views else "" for entry in planned if entry.run]
        waiting = len(planned) - len(states)
        if (ended := sum(state != RunState.FINISHED for state in states)) or waiting:
            waits = f", {waiting} wait for them" if waiting else ""
            log.info("%s: nothing to train; %d of %d ended without a result%s", self.name, ended, len(planned), waits)
        else:
            log.info("%s: all %d runs are finished, nothing to train", self.name, len(planned))
        return self._results(views)

    def _refuse(self, problems: list[str], views: Mapping[str, RunView]) -> NoReturn:
        """All that is wrong at once: what the cluster cannot hold, too."""
        from haltscale.platform.ray_connection import connected

        with connected() as cluster:
            raise ConfigError(list(dict.fromkeys([*self.problems(cluster, views), *problems])))

    def _train(self, store: RunStore, *, retry_failed: bool, adopt: bool) -> None:
        from haltscale.platform.ray_connection import connected  # Ray takes seconds to import
        from haltscale.platform.sweeps import ray_tune

        with connected() as cluster:
            problems = self.problems(cluster, self._views(store))
            if problems := problems or ([] if adopt else list(filter(None, [self.namesake(store)]))):
                raise ConfigError(problems)
            ray_tune.run_stages(self, store, retry_failed=retry_failed)

    @contextlib.contextmanager
    def _owned(self, store: RunStore) -> Iterator[None]:
        """Own the study in the store meanwhile."""
        lease = Lease(store, store.path(self.name), job=submission_id())
        try:
            lease.acquire(on_lost=_thread.interrupt_main)
        except LeaseHeldError as error:
            raise StudyBusyError(
                f"study {self.name} is {error}: follow it with `haltscale status {self.name}`, stop it with"
                f" `haltscale cancel {self.name}` (or Ctrl-C where it runs), or run this again when it has ended"
            ) from None
        try:
            yield
        except KeyboardInterrupt:
            if lease.lost:
                raise StudyBusyError(
                    f"another process took over study {self.name} while this one was silent: this one stops"
                ) from None
            raise
        finally:
            lease.release(traceless=not store.fs.exists(store.path(self.name, None, "study.json")))

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The command line of a study's module: run it, or show its plan; exits with 1 where something failed."""
        study_cli.main(self, arguments)
