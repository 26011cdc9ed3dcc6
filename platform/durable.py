"""Files that survive a power cut: complete or absent, never partial."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it replaces ``path`` when the block ends without an exception.

    A reader, and a machine that loses power, sees the old file or the new one. The contents are synchronised before the
    rename and the folder after it, without which either may be lost.

    Args:
        path: of the file; its folder exists.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield partial
        sync_file(partial)
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_durably(path: str | Path, content: bytes | Path) -> None:
    """Write a file as :func:`replacing` does.

    Args:
        path: of the file; its folder exists.
        content: the bytes, or a file to copy.
    """
    with replacing(path) as partial:
        if isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            shutil.copyfile(content, partial)


def write_json(path: str | Path, document: Any) -> None:
    """Write a JSON document as :func:`replacing` does."""
    text = json.dumps(document, indent=1, ensure_ascii=False)
    try:
        content = text.encode()
    except UnicodeEncodeError:  # file names that are not UTF-8
        content = json.dumps(document, indent=1).encode()
    write_durably(path, content)


def sync_file(path: str | Path) -> None:
    """Make a file's contents durable.

    Raises:
        OSError: the file cannot be read or synchronised.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable, where its filesystem supports that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
