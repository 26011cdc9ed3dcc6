"""A web server that serves a folder, one file of it only when it is told to."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any


class Gate:
    """Keeps one file back until it is opened."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._opened = threading.Event()

    def open(self) -> None:
        self._opened.set()

    def lets(self, path: str) -> bool:
        """Whether a file may be sent; waits for the one that is kept back."""
        return not path.endswith(self.file) or self._opened.wait(240)


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, gate: Gate, **options: Any) -> None:
        self.gate = gate
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:
        if self.gate.lets(self.path):
            super().do_GET()
        else:
            self.send_error(503)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def served(folder: str | Path, gate: Gate) -> Iterator[str]:
    """The URL of a folder on a server of this process."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, gate=gate, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        gate.open()
        server.shutdown()
        thread.join()
        server.server_close()
