"""Take a picture of the dashboard over a real store.

python tests/dashboard/screenshot.py --store ~/haltscale/runs --out docs/dashboard.png [--page tokens] [--dark]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from playwright.sync_api import ConsoleMessage, Page, sync_playwright

from haltscale.dashboard.launch import ADDRESS, command, environment, free_port

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
)


WRONG = re.compile(r"\bwarn|\berror|Traceback|Exception", re.IGNORECASE)
"""In a line of the server's log."""
KNOWN = "No runtime found, using MemoryCacheStorageManager"
"""What Streamlit says in the process that fits, which has no pages."""


def find_chromium() -> str | None:
    """The path of an installed Chromium or Chrome."""
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


@contextmanager
def server(store_root: str) -> Iterator[str]:
    """A dashboard on a free port; yields its address once it answers.

    Raises:
        RuntimeError: the server did not start, or wrote a warning or an error to its log.
    """
    port = free_port()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command(store_root, port), env=environment(store_root), stdout=log, stderr=log)
        address = f"http://{ADDRESS}:{port}"
        try:
            while not answers(f"{address}/_stcore/health"):
                if process.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"the dashboard did not start: {log.read()}")
                Event().wait(0.1)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)
        log.seek(0)
        if wrong := [line for line in log.read().splitlines() if WRONG.search(line) and KNOWN not in line]:
            raise RuntimeError("the server's log has:\n" + "\n".join(wrong))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


PROBED = ("/_stcore/health", "/_stcore/host-config")
"""Streamlit's page looks for its server below the page's own address first, and gets a 404 there."""


@contextmanager
def browser_page(
    address: str, *, dark: bool = False, width: int = 1440, height: int = 900, complaints: list[str] | None = None
) -> Iterator[Page]:
    """A page of a headless Chromium.

    Args:
        complaints: gets what the browser complains of: errors of scripts, of the console, and whatever the page's
            content policy refuses. None: a complaint raises when all is done.

    Raises:
        RuntimeError: the browser complained.
    """
    found: list[str] = [] if complaints is None else complaints

    def listen(message: ConsoleMessage) -> None:
        url = message.location.get("url", "")
        if message.type == "error" and not ("404" in message.text and url.endswith(PROBED)):
            found.append(f"{message.text} ({url})")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(FLAGS))
        try:
            context = browser.new_context(
                color_scheme="dark" if dark else "light",
                viewport={"width": width, "height": height},
                device_scale_factor=float(os.environ.get("HALTSCALE_SHOT_SCALE", "1.5")),
            )
            page = context.new_page()
            page.on("console", listen)
            page.on("pageerror", lambda error: found.append(str(error)))
            page.set_default_timeout(60_000)
            page.goto(address)
            yield page
        finally:
            browser.close()
    if complaints is None and found:
        raise RuntimeError("the browser complained:\n" + "\n".join(found))


def settled(page: Page) -> None:
    """Wait until the page is drawn: no run under way, every figure and the token map with something in them."""
    page.wait_for_selector("h1")
    page.wait_for_function(
        """() => {
            const app = document.querySelector('[data-testid="stApp"]')
            const idle = app && app.dataset.testScriptState === 'notRunning'
            const figures = [...document.querySelectorAll('[data-testid="stPlotlyChart"]')]
            const waiting = document.querySelector('[data-testid="stSkeleton"], [data-testid="stAppSkeleton"]')
            return idle && !waiting && figures.every(figure => figure.querySelector('.main-svg'))
        }"""
    )
    page.evaluate("document.fonts.ready")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True, help="root of the run store")
    parser.add_argument("--out", required=True, type=Path, help="the PNG to write")
    parser.add_argument("--page", default="", help="such as compute or tokens; the Answer page when left out")
    parser.add_argument("--query", default="", help="what stands behind the ? in the page's address")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1440)
    parser.add_argument("--height", type=int, default=1000)
    options = parser.parse_args()
    if find_chromium() is None:
        parser.error("no Chromium found; install it (Debian: apt-get install chromium)")
    with server(options.store) as address:
        target = f"{address}/{options.page}" + (f"?{options.query}" if options.query else "")
        with browser_page(target, dark=options.dark, width=options.width, height=options.height) as page:
            settled(page)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(options.out))
    sys.stdout.write(f"{options.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
