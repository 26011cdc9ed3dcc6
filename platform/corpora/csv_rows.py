"""Rows of CSV and TSV files from a stream of bytes, however long their cells are.

The csv module holds a quoted cell whole, and stops at a limit without a way to continue after it. The rows here are
those of the module in its strict mode (a test compares them), but a cell above the limit is passed over without being
held.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

END = b""
QUOTE = b'"'


class CsvError(ValueError):
    """The bytes are not CSV; the message names the line."""


@dataclass(frozen=True)
class Cell:
    """One cell of a row."""

    content: bytes | None
    """None where it is longer than the limit."""
    offset: int
    """Of its first byte in the file."""


class CsvScanner:
    """Reads rows.

    Args:
        chunks: the file's bytes, in parts of any size.
        offset: where in the file they begin.
        delimiter: one ASCII character.
        quotes: whether a quotation mark at the beginning of a cell quotes it.
        reject_swallowed_rows: refuse a quoted cell that looks like rows which a stray quotation mark has merged.
        longest: bytes of a cell above which it is passed over.
    """

    def __init__(
        self,
        chunks: Iterator[bytes],
        *,
        offset: int,
        delimiter: bytes,
        quotes: bool,
        reject_swallowed_rows: bool,
        longest: int,
    ) -> None:
        self._chunks, self._delimiter, self._quotes, self._longest = chunks, delimiter, quotes, longest
        self._reject_swallowed_rows = reject_swallowed_rows
        self._ends_unquoted = re.compile(b"[" + re.escape(delimiter) + b"\n]")
        self._data, self._at, self._base = b"", 0, offset
        self._parts: list[bytes] = []
        self._held = 0
        self.line = 1
        """Of the next row."""
        self.width = 0
        """Cells of the first row, which is the header; every other row has as many."""

    def rows(self) -> Iterator[list[Cell]]:
        """The rows, without blank lines.

        Raises:
            CsvError: a row has more or fewer cells than the first, or its quotation marks do not fit.
        """
        while self._peek() != END:
            row: list[Cell] = []
            first_line, ends, is_quoted = self.line, False, False
            while not ends:
                cell, ends, is_quoted = self._cell(row)
                row.append(cell)
                if self.width and len(row) > self.width:
                    break
            if len(row) == 1 and not is_quoted and self._is_blank(row[0].content):
                continue
            if self.width and len(row) != self.width:
                more = f"at least {len(row)}" if len(row) > self.width else str(len(row))
                raise CsvError(
                    f"line {first_line}: the row has {more} cells, the header has {self.width}; quote cells that hold"
                    f" {self._delimiter.decode()!r} or line ends, or name another delimiter"
                )
            self.width = self.width or len(row)
            yield row

    def _is_blank(self, content: bytes | None) -> bool:
        """Whether a line is not a row; white space is one where rows have a single cell."""
        return content is not None and not (content if self.width == 1 else content.strip())

    def _peek(self) -> bytes:
        """The next byte, or END."""
        if self._at == len(self._data):
            self._more()
        return self._data[self._at : self._at + 1]

    def _more(self) -> bool:
        """Go on to the next chunk; False at the end of the file."""
        self._base += len(self._data)
        self._data, self._at = next(self._chunks, b""), 0
        return bool(self._data)

    def _take(self, end: int) -> None:
        """Add the bytes up to ``end`` of the chunk to the cell; count only, where it is too long already."""
        part = self._data[self._at : end]
        self._at = end
        self.line += part.count(b"\n")
        self._held += len(part)
        if self._held <= self._longest + 1:  # a carriage return before the line's end does not count
            self._parts.append(part)
        else:
            self._parts = []

    def _cell(self, row: list[Cell]) -> tuple[Cell, bool, bool]:
        """The next cell, whether it ends its row, and whether it is quoted; ``row``: the cells before it."""
        self._parts, self._held = [], 0
        if self._quotes and self._peek() == QUOTE:
            return *self._quoted(row), True
        offset = self._base + self._at
        while not (found := self._ends_unquoted.search(self._data, self._at)):
            self._take(len(self._data))
            if not self._more():
                break
        ends = found is None or found.group() == b"\n"
        if found:
            self._take(found.start())
            self._at = found.end()
        content = b"".join(self._parts)
        if ends and content.endswith(b"\r"):
            content, self._held = content[:-1], self._held - 1
        if b"\r" in content:
            raise CsvError(f"line {self.line}: a carriage return within a line is in a cell without quotes")
        self.line += ends
        return Cell(content if self._held <= self._longest else None, offset), ends, False

    def _quoted(self, row: list[Cell]) -> tuple[Cell, bool]:
        self._at += 1
        first_line, offset = self.line, self._base + self._at
        while True:
            end = self._data.find(QUOTE, self._at)
            if end >= 0:
                self._take(end)
                self._at += 1
                if self._peek() != QUOTE:
                    break
                self._take(self._at + 1)  # of a doubled mark, one
            else:
                self._take(len(self._data))
                if not self._more():
                    raise CsvError(f"line {first_line}: the quoted cell that begins here never ends")
        following = self._peek()
        if following == b"\r":
            self._at += 1
            following = self._peek() if self._peek() in (b"\n", END) else b"\r"
        if following not in (self._delimiter, b"\n", END):
            raise CsvError(f"line {self.line}: text follows the closing quotation mark of a cell")
        self._at += len(following)
        ends = following != self._delimiter
        content = b"".join(self._parts).replace(b"\r\n", b"\n")
        if self._reject_swallowed_rows and self._swallowed_rows(row, content):
            raise CsvError(
                f"line {first_line}: a quoted cell spans lines that look like rows of their own; set"
                " quoting='none' where quotation marks are letters, quoting='double' where they quote"
            )
        self.line += ends
        return Cell(content if self._held <= self._longest else None, offset), ends

    def _swallowed_rows(self, row: list[Cell], content: bytes) -> bool:
        """Whether a quoted cell's lines are what rows would be that a stray pair of quotation marks has merged.

        The lines between have every delimiter of a row, the first and the last those of its beginning and end. Commas
        are common in texts, so with them each line must also begin with a number, as this row does.
        """
        first, *others = content.split(b"\n")
        if not others or self.width < 2:
            return False
        *between, last = [line.count(self._delimiter) for line in others]
        fits = first.count(self._delimiter) == self.width - 1 - len(row) and last == len(row)
        if not fits or any(count != self.width - 1 for count in between):
            return False
        if self._delimiter == b"\t":
            return True
        number = row[0].content if row else b""
        return bool(number and number.isdigit()) and all(
            line.split(self._delimiter)[0].isdigit() for line in others if self._delimiter in line
        )
