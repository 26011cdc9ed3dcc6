"""Files that survive a power cut: whole or not there, never half."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path


def write_durably(path: str | Path, content: bytes | Path) -> None:
    """Write a file so that a reader, and a machine that loses power, sees the old one or the new one, never a part.

    Written beside it, synchronised, renamed; then the folder is synchronised, without which the rename may be lost.

    Args:
        path: of the file; its folder exists.
        content: the bytes, or a file to copy.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                with open(content, "rb") as source:
                    shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Make the names in a folder durable; does nothing where a platform cannot."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
