"""Start the dashboard: ``haltscale dashboard``, or ``python -m haltscale.dashboard``.

The server listens on this machine only (127.0.0.1): a store can hold text that nobody else should read.
"""

from __future__ import annotations

import argparse
import importlib.resources
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from haltscale.platform.cluster import LOOPBACK, free_ports
from haltscale.platform.store import RunStore, default_root

DEMO = "results"
"""Folder in the room of studies with the records that are published with the code."""
ADDRESS = LOOPBACK
PORT = 8501


def demo_root() -> str:
    """Root of the store with the published studies.

    Raises:
        FileNotFoundError: this installation has none; the message says what to do.
    """
    root = Path(str(importlib.resources.files("haltscale.studies") / DEMO))
    if not RunStore(root).studies():
        raise FileNotFoundError(
            f"{root} holds no published study: use a clone of the repository, or train one with `make study`"
        )
    return str(root)


def is_free(port: int) -> bool:
    """Whether this machine lets us listen on a port."""
    return free_ports(1, preferred=(port,)) == [port]


def free_port() -> int:
    """The dashboard's own port, or any free one when it is taken."""
    return free_ports(1, preferred=(PORT,))[0]


def environment(store_root: str) -> dict[str, str]:
    """The server's environment: this one, with the store's root made independent of the working directory."""
    root = store_root if "://" in store_root else str(Path(store_root).expanduser().absolute())
    return {**os.environ, "HALTSCALE_STORE": root}


def command(store_root: str, port: int | None) -> list[str]:
    """The line that starts the server. Theme and manners stand in ``.streamlit/config.toml`` beside ``app.py``.

    ``store_root`` reaches the server through :func:`environment`; it is taken here so that both are called alike.
    """
    app = Path(__file__).with_name("app.py")
    options = {
        "server.address": ADDRESS,
        "server.port": str(free_port() if port is None else port),
        "server.headless": "true",
        "browser.gatherUsageStats": "false",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", "streamlit", "run", str(app), *flags]


def main(argv: Sequence[str] | None = None) -> int:
    """Start the server, say where it is, and stay until it ends."""
    parser = argparse.ArgumentParser(
        prog="haltscale dashboard",
        description="Show the studies of a run store.",
        epilog="example: haltscale dashboard --port 8501",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--store", default=None, help="root of the run store, a folder or a URL (default: HALTSCALE_STORE)"
    )
    shown.add_argument("--demo", action="store_true", help="show the studies that are published with the code")
    parser.add_argument(
        "--port", type=int, default=None, help=f"port on {ADDRESS} (default: {PORT}, else any free one)"
    )
    options = parser.parse_args(argv)
    if options.port is not None and not 0 < options.port < 1 << 16:
        parser.error(f"port {options.port}: must be a number from 1 to 65535")
    if options.port is not None and not is_free(options.port):
        parser.error(f"port {options.port} is taken; choose another or leave --port out")
    try:
        root = demo_root() if options.demo else options.store or default_root()
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    port = options.port or free_port()
    sys.stdout.write(f"haltscale dashboard: http://{ADDRESS}:{port}\nstore: {environment(root)['HALTSCALE_STORE']}\n")
    sys.stdout.flush()
    try:
        return subprocess.run(command(root, port), env=environment(root), check=False).returncode
    except KeyboardInterrupt:
        return 0
