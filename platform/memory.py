"""Memory that is freed stays with the process while a run trains, and goes back to the system when it ends.

A training step frees what the next one takes again. glibc's malloc gives large blocks back to the kernel at once, and
the kernel fills them with zeros, page by page, when they are allocated again: a tenth of a small model's step (LOG.md,
2026-11-25).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_MOST = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Have this process keep what it frees, for the next one that asks: it stays as large as it ever was.

    Blocks above 2 GiB still go back at once. Other C libraries than glibc know no such order: nothing is changed there.

    Returns:
        Whether it was understood.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _MOST)) and bool(mallopt(_MMAP_THRESHOLD, _MOST))


def release_freed_memory() -> None:
    """Give back what this process has freed.

    A process that trains run after run may train each in another thread, and a thread takes memory from an arena of its
    own: what the last one freed is of no use to the next. Other C libraries than glibc are left alone.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def collect_garbage(*, settled: bool) -> None:
    """Collect what a run has left behind, and give its memory back.

    Args:
        settled: whether what is alive then is what stays: the imported modules, which are most of the objects of a
            process and a third of a second's search each time. The first such call exempts them from all later
            searches.
    """
    gc.collect()
    if settled and not gc.get_freeze_count():
        gc.freeze()
    release_freed_memory()
