"""The study as its author uses it: define it, plan it, run it.

Running a study again runs nothing; adding a value runs only what is new; an interrupted study resumes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from haltscale.platform.config import ConfigError
from haltscale.platform.store import RunStore
from haltscale.platform.sweeps import study_cli
from haltscale.platform.sweeps.plan import StudyPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Study(StudyPlan):
    """A question, a corpus, a base run and a sweep; see :class:`~haltscale.platform.sweeps.spec.StudySpec`."""

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
            from haltscale.platform.ray_connection import connected  # Ray takes seconds to import
            from haltscale.platform.sweeps import ray_tune

            with connected() as cluster:
                if problems := self.problems(cluster, self._views(store)):
                    raise ConfigError(problems)
                with ray_tune.held(self.name):
                    ray_tune.run_stages(self, store)
            return self.results(store)
        results = self._results(views)
        log.info("%s: all %d runs are finished, nothing to train", self.name, len(results))
        return results

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The command line of a study's module: run it, or show its plan; exits with 1 where something failed."""
        study_cli.main(self, arguments)
