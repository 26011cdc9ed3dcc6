"""A study that gets notice of its end: its runs save what they have, then it ends as by SIGTERM.

SIGUSR2 tells it: deploy/slurm.sh sends that some time before a job's time limit, and whoever else knows of an end can.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import threading
import time

from haltscale.platform.lease import give_notice, has_notice
from haltscale.platform.store import RunState, RunStore

log = logging.getLogger(__name__)

GRACE_SECONDS = 60.0
"""How long runs have to save, where ``HALTSCALE_GRACE_SECONDS`` does not say otherwise."""
POLL_SECONDS = 0.5


def save_and_end(store: RunStore, study: str) -> None:
    """Begin to: a thread tells the runs, waits until all have saved, and ends this process as SIGTERM would."""

    def work() -> None:
        try:
            save(store, study, seconds=float(os.environ.get("HALTSCALE_GRACE_SECONDS", GRACE_SECONDS)))
        except Exception:  # a store that is away: what was saved before is there all the same
            log.exception("%s: could not tell its runs to save", study)
        _thread.interrupt_main(signal.SIGTERM)

    threading.Thread(target=work, daemon=True, name="notice").start()


def save(store: RunStore, study: str, *, seconds: float) -> int:
    """Have the runs that are training now save a checkpoint; how many of them did.

    Args:
        seconds: to wait for them at most. A step and a checkpoint must fit.
    """
    began = time.monotonic()
    running = [view.key for view in store.runs(study) if view.state is RunState.RUNNING]
    for key in running:
        give_notice(store, store.path(study, key))
    log.info("%s: told of its end: %d runs are to save, within %.0f s", study, len(running), seconds)
    left = running
    while left and time.monotonic() - began < seconds:
        time.sleep(POLL_SECONDS)
        left = [key for key in left if has_notice(store, store.path(study, key))]
    saved = len(running) - len(left)
    log.info("%s: %d of %d runs have saved", study, saved, len(running))
    return saved
