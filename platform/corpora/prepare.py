"""Prepare a corpus, or open it where that was done before.

:func:`prepare` prepares all of it (:mod:`.pipeline`). :func:`begin` lets the caller train while a streamed corpus is
still being prepared (:mod:`.streamed`). Both work in this process or through a runner (Ray Data's is in
:mod:`.ray_data`).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from haltscale.platform.corpora.corpus import SHARED_WAIT_SECONDS, WAIT_SECONDS, Corpus, CorpusError, PreparedCorpus
from haltscale.platform.corpora.pipeline import Preparation, Runner
from haltscale.platform.corpora.shard_jobs import UNWRITABLE, Result
from haltscale.platform.corpora.shared import SharedFolder, origin_of, shared_root
from haltscale.platform.corpora.streamed import StreamedPreparation
from haltscale.platform.durable import write_json
from haltscale.platform.lease import Lease, LeaseHeldError

log = logging.getLogger(__name__)

STOP_SECONDS = 30.0
"""How long the end of a study waits for the shard at hand."""


def in_process(function: Callable[[Any], Result], jobs: list[Any]) -> Iterator[Result]:
    """The runner without a cluster."""
    return map(function, jobs)


def prepare(corpus: Corpus, context: int, *, batch: int = 1, run: Runner = in_process) -> PreparedCorpus:
    """Prepare a corpus for a context length, or open it where that was done before.

    Args:
        corpus: what to prepare.
        context: tokens that a row predicts.
        batch: sequences that a training step needs.
        run: spreads the work.

    Raises:
        CorpusError: the corpus cannot be prepared as it is, or the cache cannot be written; nothing was published. What
            was finished before the disk filled or the process was killed is kept, and the next call resumes from it.
    """
    return _enough_for(batch, _prepare(corpus, context, run, rows=None, stop=threading.Event()))


@contextlib.contextmanager
def begin(
    corpus: Corpus, context: int, *, batch: int = 1, rows: int | None = None, run: Runner = in_process
) -> Iterator[PreparedCorpus]:
    """Like :func:`prepare`, but of a streamed corpus only the beginning; a thread prepares the rest beside the block.

    What the block has not waited for (:meth:`PreparedCorpus.wait_for`) when it ends is left to a later preparation.

    Args:
        corpus: what to prepare.
        context: tokens that a row predicts.
        batch: sequences that a training step needs.
        rows: how many rows will be drawn, so that no more is prepared; None: all there are.
        run: spreads the work; called in the thread.

    Yields:
        The corpus, with at least one batch.

    Raises:
        CorpusError: as in :func:`prepare`; what fails later is raised where it is waited for.
    """
    prepared = _opened(corpus, context)
    if corpus.segment_tokens is None or (prepared and prepared.is_complete):
        yield prepare(corpus, context, batch=batch, run=run)
        return
    if prepared and prepared.counts.pop("problem", None):  # it is tried again: those who wait do not see the old one
        with contextlib.suppress(OSError):
            write_json(prepared.folder / "corpus.json", prepared.counts)
            if prepared.url:
                SharedFolder(prepared.url).replace_counts(prepared.counts)
    stop = threading.Event()
    failures: list[Exception] = []

    def prepare_rest() -> None:
        try:
            wanted = None if rows is None else max(rows, batch)
            _prepare(corpus, context, run, rows=wanted, stop=stop)
        except Exception as error:
            failures.append(error)
            if not stop.is_set():
                log.error("preparation of corpus %s failed: %s", corpus.name, error)

    thread = threading.Thread(target=prepare_rest, daemon=True, name=f"corpus-{corpus.name}")
    thread.start()
    try:
        while not (prepared and prepared.has(batch)):
            is_over = not thread.is_alive()
            prepared = _opened(corpus, context)
            if is_over and failures and not (prepared and prepared.has(batch)):
                raise failures[0]
            thread.join(WAIT_SECONDS)
        yield _enough_for(batch, prepared)
    finally:
        stop.set()
        thread.join(STOP_SECONDS)


def _enough_for(batch: int, prepared: PreparedCorpus) -> PreparedCorpus:
    if prepared.rows < batch:
        few = f"{prepared.rows} training rows of {prepared.counts['context']} tokens, but one batch needs {batch}"
        advice = "use a larger corpus, a shorter context or a smaller batch"
        raise CorpusError(prepared.counts["name"], [f"{few}: {advice}"])
    return prepared


def _prepare(corpus: Corpus, context: int, run: Runner, *, rows: int | None, stop: threading.Event) -> PreparedCorpus:
    try:
        folder = corpus.cache(context)
    except CorpusError:
        _refuse(corpus)  # with everything that is wrong
        raise

    def there() -> PreparedCorpus | None:
        prepared = _opened(corpus, context)
        if prepared and prepared.url and not SharedFolder(prepared.url).counts():
            return None  # prepared here, but not uploaded yet
        return prepared if prepared and (prepared.is_complete or (rows is not None and prepared.has(rows))) else None

    if prepared := there():
        return prepared
    _refuse(corpus)
    try:
        with _alone(folder, stop), _owned(corpus.place(context), stop):
            _remove_outdated(folder, corpus)
            if prepared := there():  # another process may have been faster
                return prepared
            if origin_of(folder):  # begun by a node that is gone, with what it had on its disk: it is begun again
                shutil.rmtree(folder)
            if corpus.segment_tokens is None and not PreparedCorpus.open(folder):
                prepared = Preparation(corpus, context, folder, run).publish()
            elif corpus.segment_tokens is not None:
                prepared = StreamedPreparation(corpus, context, folder, run, rows=rows, stop=stop).publish()
            if shared_root():
                SharedFolder(corpus.place(context)).publish()
            prepared = _opened(corpus, context)
            assert prepared is not None, "just published"
            for line in prepared.losses():
                log.warning("corpus %s: source %s", corpus.name, line)
            return prepared
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        message = f"the cache {folder.parent} cannot be written ({error.strerror}): free space, or point"
        kept = "HALTSCALE_HOME elsewhere; finished shards are kept, and preparing again resumes from them"
        raise CorpusError(corpus.name, [f"{message} {kept}"]) from error


def _refuse(corpus: Corpus) -> None:
    if problems := corpus.problems():
        prefix = f"corpus {corpus.name}: "
        raise CorpusError(corpus.name, [problem.removeprefix(prefix) for problem in problems])


def _opened(corpus: Corpus, context: int) -> PreparedCorpus | None:
    """What is in the cache, if today's readers would make the same of its sources.

    Raises:
        CorpusError: it is damaged.
    """
    prepared = PreparedCorpus.open(corpus.place(context), corpus.weights)
    if prepared is None or prepared.is_outdated(corpus):
        return None
    prepared.check_parts()
    return prepared


def _remove_outdated(folder: Path, corpus: Corpus) -> None:
    prepared = PreparedCorpus.open(folder)
    if prepared is None or not prepared.is_outdated(corpus):
        return
    log.warning("%s was prepared by an older version, which took what is refused now: it is made again", folder)
    aside = folder.with_name(f"{folder.name}.outdated")
    folder.rename(aside)
    shutil.rmtree(aside)


@contextlib.contextmanager
def _owned(place: str, stop: threading.Event) -> Iterator[None]:
    """One preparation at a time of a corpus that nodes share, by a lease; nothing to do where they share a folder."""
    if not shared_root():
        yield
        return
    shared, is_logged = SharedFolder(place), False
    lease = Lease(shared, shared.path)
    while True:
        try:
            lease.acquire()
            break
        except LeaseHeldError as error:
            if not is_logged:
                log.info("waiting for %s: %s", place, error)
            is_logged = True
            if stop.wait(SHARED_WAIT_SECONDS):
                raise CorpusError(shared.local.name, ["another node prepares it"]) from None
    try:
        yield
    finally:
        lease.release()


@contextlib.contextmanager
def _alone(folder: Path, stop: threading.Event) -> Iterator[None]:
    """One preparation of a folder at a time; the system releases the lock however its holder ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f"{folder.name}.lock")
    is_logged = False
    while True:
        lock = open(path, "w")  # noqa: SIM115 - closed below
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            if not is_logged:
                log.info("another process prepares %s: waiting for it", folder.name)
            is_logged = True
            if stop.wait(WAIT_SECONDS):
                raise CorpusError(folder.name, ["another process is preparing it"]) from None
            continue
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            break
        lock.close()  # it was removed by the process that held it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()
