"""Compressed files: which are read through, by which library, and which are refused by name."""

from __future__ import annotations

import lzma
from typing import Any

import pyarrow as pa

COMPRESSIONS = {
    ".gz": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bz2",
    ".xz": "xz",
    ".lzma": "xz",
    ".lz4": "lz4",
}
"""Read through, in one piece or several."""
PACKED = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".z", ".br", ".sz", ".snappy", ".lzo")
"""Archives, and compressions that no library here reads as a stream."""


def compression(name: str) -> str | None:
    """How a file is compressed, by its name's last suffix; None where it is not."""
    return next((codec for suffix, codec in COMPRESSIONS.items() if name.lower().endswith(suffix)), None)


def bare_name(name: str) -> str:
    """A file's name without its compression."""
    return next((name[: -len(suffix)] for suffix in COMPRESSIONS if name.lower().endswith(suffix)), name)


def packed_suffix(name: str) -> str | None:
    """The suffix of an archive, or of a compression that is not read."""
    return next((suffix for suffix in PACKED if bare_name(name).lower().endswith(suffix)), None)


def open_compressed(raw: Any, codec: str) -> Any:
    """The unpacked bytes of an open file; cut ones raise OSError or EOFError, damaged ones OSError or LZMAError."""
    return lzma.LZMAFile(raw) if codec == "xz" else pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), codec)
