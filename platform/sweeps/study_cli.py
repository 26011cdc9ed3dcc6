"""The command line that every study's module has."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from haltscale.platform.cluster import ClusterError
from haltscale.platform.config import ConfigError
from haltscale.platform.store import RunState, RunStore, StoreError
from haltscale.platform.sweeps import notice, report
from haltscale.platform.sweeps.expense import Rates, priced, summary
from haltscale.platform.training.mfu import PEAKS

log = logging.getLogger(__name__)


class StudyBusyError(RuntimeError):
    """Another process is running the study; the message says which."""


_captured: list[Any] | None = None


class _Captured(BaseException):
    """Ends a study's script where it would have begun to run."""


@contextlib.contextmanager
def captured() -> Iterator[list[Any]]:
    """Within the block, ``Study.main()`` runs nothing: its study is put into the list, and the script that called it
    ends there."""
    global _captured
    found: list[Any] = []
    _captured = found
    try:
        with contextlib.suppress(_Captured):
            yield found
    finally:
        _captured = None


def main(study: Any, arguments: Sequence[str] | None = None) -> None:
    """Run a study (:class:`~haltscale.platform.sweeps.study.Study`) as its command line says, or show its plan."""
    if _captured is not None:
        _captured.append(study)
        raise _Captured
    parser = argparse.ArgumentParser(
        description=study.question,
        epilog="example: --dry-run --set tokens=100000 shows the plan of shorter runs and starts nothing",
    )
    parser.add_argument("--store", help="root of the run store: a folder or an fsspec URL")
    parser.add_argument("--dry-run", action="store_true", help="show what would run and stop")
    parser.add_argument(
        "--mfu", type=float, help="with --dry-run: device-hours at this share (0 to 1) of the peak FLOP/s"
    )
    parser.add_argument(
        "--device", default=Rates.device, help=f"with --mfu: {', '.join(PEAKS)} (default: {Rates.device})"
    )
    parser.add_argument("--price", type=float, help="with --mfu: the price of one device-hour")
    parser.add_argument("--json", action="store_true", help="print the table as JSON; everything else goes to stderr")
    parser.add_argument(
        "--retry-failed", action="store_true", help="retry runs that diverged, were refused, or reached max_hours"
    )
    parser.add_argument("--adopt", action="store_true", help="continue the runs of another study of the same name")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override a field of the base run or of the execution for all runs, e.g. --set tokens=100000",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="plan and run that part of the sweep alone, e.g. --only method=vanilla --only seed=0",
    )
    options = parser.parse_args(arguments)
    if options.mfu is not None and not options.dry_run:
        parser.error("--mfu is for --dry-run: it says what a study will cost, and runs nothing")
    if options.price is not None and options.mfu is None:
        parser.error("--price needs --mfu: money is device-hours times the price")
    stream = sys.stderr if options.json else sys.stdout
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=stream, force=True)
    terminated: list[int] = []

    def end_like_ctrl_c(number: int, frame: Any) -> None:
        terminated.append(number)
        raise KeyboardInterrupt  # which Ray hands on as it is; of SystemExit it makes another one

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, end_like_ctrl_c)
    try:
        chosen = study.overridden(options.set)
        if options.only:
            chosen = chosen.only(options.only)
        if not chosen.source:
            chosen = replace(chosen, source=_source())
        store = RunStore(options.store)
        if options.dry_run:
            plan, rates = chosen.plan(store), None
            if options.mfu is not None:
                rates = Rates(mfu=options.mfu, device=options.device, price=options.price)
                plan = priced(plan, rates)
            report.show_plan(plan, title=f"{chosen.name}: the plan", as_json=options.json)
            if rates and not options.json:
                report.say(summary(plan, rates))
            if chosen.targets and not options.json:
                claims = pd.DataFrame([{"claim": each.claim, "source": each.source} for each in chosen.targets])
                report.show(claims, title=f"{chosen.name}: its targets")
            return
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR2, lambda *_: notice.save_and_end(store, chosen.name))  # SIGUSR1 is Tune's
        results = chosen.run(store, retry_failed=options.retry_failed, adopt=options.adopt)
    except (ConfigError, StoreError, StudyBusyError, ClusterError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        log.info("interrupted: finished runs are kept, unfinished ones resume from their last checkpoint")
        sys.exit(128 + (terminated[0] if terminated else signal.SIGINT))
    report.show_results(results, title=chosen.name, note=chosen.note, as_json=options.json)
    if not options.json:
        report.show_targets(report.judged_targets(store, chosen.name), title=f"{chosen.name}: targets")
    status = chosen.status(store)
    states = status[status["role"] == chosen.role]["state"]  # a diverged tuning run is a result too
    if unfinished := int((~states.isin([RunState.FINISHED, RunState.STOPPED])).sum()):
        permanent = int(states.isin([RunState.DIVERGED, RunState.CAPPED]).sum())
        advice = "submit the study again to resume"
        advice += f" ({permanent} diverged or reached max_hours: retried only with --retry-failed)" if permanent else ""
        sys.exit(f"{unfinished} of {len(states)} runs have no result; {advice}")


def _source() -> str:
    """Where the running script is defined: the module's name, or the file's."""
    main_module = sys.modules["__main__"]
    spec = getattr(main_module, "__spec__", None)
    return spec.name if spec else Path(getattr(main_module, "__file__", None) or "").name
