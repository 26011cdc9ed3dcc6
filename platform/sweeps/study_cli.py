"""The command line that every study's module has."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

from haltscale.platform.cluster import ClusterError
from haltscale.platform.config import ConfigError
from haltscale.platform.store import RunState, RunStore, StoreError
from haltscale.platform.sweeps import report

log = logging.getLogger(__name__)


class StudyBusyError(RuntimeError):
    """Another process is running the study; the message says which."""


def main(study: Any, arguments: Sequence[str] | None = None) -> None:
    """Run a study (:class:`~haltscale.platform.sweeps.study.Study`) as its command line says, or show its plan."""
    parser = argparse.ArgumentParser(
        description=study.question,
        epilog="example: --dry-run --set tokens=100000 shows what shorter runs would be and starts nothing",
    )
    parser.add_argument("--store", help="root of the run store: a folder or an fsspec URL")
    parser.add_argument("--dry-run", action="store_true", help="show what would run and stop")
    parser.add_argument("--json", action="store_true", help="print the table as JSON, and everything else to stderr")
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
        chosen = study.overridden(options.set)
        store = RunStore(options.store)
        if options.dry_run:
            report.show_plan(chosen.plan(store), title=f"{chosen.name}: the plan", as_json=options.json)
            return
        results = chosen.run(store)
    except (ConfigError, StoreError, StudyBusyError, ClusterError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        log.info("interrupted: finished runs are kept, begun ones go on from their last checkpoint next time")
        sys.exit(130)
    report.show_results(results, title=chosen.name, note=chosen.note, as_json=options.json)
    states = chosen.status(store)["state"]
    if unfinished := int((~states.isin([RunState.FINISHED, RunState.STOPPED])).sum()):
        sys.exit(f"{unfinished} of {len(states)} runs have no result; submit the study again to go on")
