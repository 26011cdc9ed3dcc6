"""How fast the dashboard is on a generated store: first paint of each page, a filter, a search, a live look.

python benchmarks/dashboard.py [--runs 1000] [--events 10000000] [--large 10000]

Every figure is a median over repeats. "First paint" and "filter" are of one process, in Streamlit's own test runner:
what the server does, without the browser's drawing. "In Chromium", where there is one, is the whole way from the
address to the first figure, table or text on the screen, and to everything drawn.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from figures import Figure, show

SCREENSHOT = Path(__file__).parents[1] / "tests" / "dashboard" / "screenshot.py"
USEFUL = ", ".join(
    (
        '[data-testid="stPlotlyChart"] .main-svg',
        *(f'[data-testid="{name}"]' for name in ("stDataFrame", "stMetric", "stAlert", "stCode")),
        ".token",
    )
)
"""What a reader came for, in place of a title."""
PAGES = (
    *("answer", "compute", "sensitivity", "halting", "tokens", "cost", "evaluations", "live", "studies"),
    *("playground", "method"),
)


def timed(work: Callable[..., object], *given: object) -> float:
    began = time.perf_counter()
    work(*given)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--large", type=int, default=10_000, help="runs of a second store, opened with its index")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as home:
        os.environ |= {"HALTSCALE_STORE": folder, "HALTSCALE_HOME": home}
        from generated_store import generate

        generate(Path(folder), runs=options.large, logged=5)
        opened(options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HALTSCALE_STORE"] = folder
        from generated_store import generate

        began = time.perf_counter()
        keys = generate(Path(folder), runs=options.runs, events=options.events)
        seconds = time.perf_counter() - began
        print(f"store: {len(keys)} runs, {options.events:,} token events, written in {seconds:.0f} s")
        measure(Path(folder), options.repeats)
        in_browser(Path(folder), options.repeats)


def opened(repeats: int) -> None:
    """A large study, as a server that has just started opens it: without an index, and with the one of the last."""
    import streamlit as st

    from haltscale.dashboard import cached_store, data
    from haltscale.platform.store import RunStore

    cached_store.store().view("generated")  # imports, and the files into the machine's memory
    store, cold, warm, looks, changed = cached_store.store(), [], [], [], []
    for path in (Path(os.environ["HALTSCALE_HOME"]) / "cache" / "index").rglob("*.pickle"):
        size = path.stat().st_size
    for _ in range(repeats):
        cold.append(timed(data.load_study, RunStore(), "generated"))
        st.cache_resource.clear()
        fresh = cached_store.store()
        warm.append(timed(fresh.view, "generated"))
        looks.append(timed(fresh.view, "generated"))
        key = str(fresh.view("generated").runs["key"].iloc[0])
        path = store.path("generated", key, "record.json")
        store.write_json(path, store.read_json(path))
        changed.append(timed(fresh.view, "generated"))
    count = len(store.run_keys("generated"))
    show(Figure(name=f"{count} runs without an index", values=cold, unit="s"))
    show(Figure(name=f"{count} runs with their index", values=warm, unit="s", at_most=3, detail=f"{size / 1e6:.0f} MB"))
    show(Figure(name="times as fast with the index", values=[a / b for a, b in zip(cold, warm, strict=True)]))
    show(Figure(name=f"{count} runs, another look", values=looks, unit="s", at_most=1))
    show(Figure(name=f"{count} runs, a look after one has changed", values=changed, unit="s", at_most=3))


def measure(root: Path, repeats: int) -> None:
    import streamlit as st
    from streamlit.testing.v1 import AppTest

    import haltscale.dashboard
    from haltscale.dashboard import cached_store, data

    app = Path(haltscale.dashboard.__file__).parent / "app.py"

    def open_page(name: str) -> AppTest:
        page = AppTest.from_file(str(app), default_timeout=300).run()
        page.switch_page(f"app_pages/{name}.py").run()
        assert not page.exception, page.exception[0].message
        return page

    def forget() -> None:
        st.cache_data.clear()
        st.cache_resource.clear()

    open_page("studies")  # imports
    for name in PAGES:
        cold, warm, filters, most = [], [], [], 0
        for _ in range(repeats):
            forget()
            cold.append(timed(open_page, name))
            warm.append(timed(open_page, name))
            page = open_page(name)
            filters.append(timed(page.pills(key="method").set_value(["vanilla", "adaptive"]).run))
            most = max([most, *(points(chart.proto.spec) for chart in page.get("plotly_chart"))])
        show(Figure(name=f"{name}: first paint, nothing read before", values=cold, unit="s"))
        show(Figure(name=f"{name}: first paint, store read before", values=warm, unit="s", at_most=2))
        show(Figure(name=f"{name}: filter", values=filters, unit="s", at_most=1))
        show(Figure(name=f"{name}: points in the largest figure", values=[most], at_most=10_000))

    store = cached_store.store()
    study = store.studies()[0]
    store.view(study)
    looks = [timed(store.view, study) for _ in range(repeats)]
    show(Figure(name="another look at a study that has not changed", values=looks, unit="s"))
    telling = [key for key in store.present(study) if data.halting_steps(store, study, key)]
    if telling:
        from haltscale.dashboard.search import Order, search

        key = telling[0]
        step = data.halting_steps(store, study, key)[-1]
        events = store.local_path(study, key, "halting", f"events-{step:08d}.parquet")
        for order in Order:
            took = [timed(search, events, Path("none"), order) for _ in range(repeats)]
            show(Figure(name=f"search one run's events, {order.value}", values=took, unit="s"))


def in_browser(root: Path, repeats: int) -> None:
    """A real server and a real browser; the store has been read before."""
    spec = importlib.util.spec_from_file_location("screenshot", SCREENSHOT)
    assert spec is not None
    assert spec.loader is not None
    tools = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tools)
    if tools.find_chromium() is None:
        print("no Chromium found: nothing was measured in a browser")
        return
    with tools.server(str(root)) as address, tools.browser_page(address) as page:
        for name in PAGES:
            first, whole = [], []
            for repeat in range(repeats + 1):
                began = time.perf_counter()
                page.goto(f"{address}/{'' if name == PAGES[0] else name}")
                page.locator(USEFUL).first.wait_for()
                useful = time.perf_counter() - began
                tools.settled(page)
                if repeat:  # the first reads the store and imports the page
                    first.append(useful)
                    whole.append(time.perf_counter() - began)
            show(Figure(name=f"{name}: first useful paint in Chromium", values=first, unit="s", at_most=2))
            show(Figure(name=f"{name}: all drawn in Chromium", values=whole, unit="s"))


def points(spec: str) -> int:
    """Points of a figure as it goes to the browser: of lines and markers, of coordinates, cells of maps."""
    return sum(
        max(
            size(trace.get("x")),
            *(size(axis.get("values")) for axis in trace.get("dimensions", [])),
            size(trace["x"]) * size(trace["y"]) if trace["type"] == "heatmap" else 0,
        )
        for trace in json.loads(spec)["data"]
    )


def size(values: object) -> int:
    """Length of an array, plain or packed as Plotly packs it."""
    if isinstance(values, dict) and "bdata" in values:
        return len(base64.b64decode(values["bdata"])) // np.dtype(values["dtype"]).itemsize
    return len(values) if isinstance(values, list) else 0


if __name__ == "__main__":
    main()
