"""Every page over the store that the benchmark generates: a thousand runs, some with telemetry of many tokens."""

import importlib.util
from pathlib import Path

import pytest
from pages import PAGES, TITLES, open_page, text

RUNS, EVENTS = 1_000, 300_000
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/dashboard.py, which counts a figure's points as the browser gets them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("dashboard_benchmark", BENCHMARKS / "dashboard.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module", autouse=True)
def root(benchmark, tmp_path_factory):
    """The store, generated once."""
    folder = tmp_path_factory.mktemp("huge")
    importlib.import_module("generated_store").generate(folder, runs=RUNS, events=EVENTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALTSCALE_STORE", str(folder))
        yield folder


@pytest.mark.parametrize(
    ("name", "query", "figures"),
    [
        *((name, {}, 0) for name in PAGES if name not in ("live", "compute", "sensitivity", "halting", "tokens")),
        ("live", {}, 2),
        ("compute", {}, 1),
        ("compute", {"fits": "true"}, 1),
        ("compute", {"view": "IsoFLOP"}, 1),
        ("compute", {"view": "Multipliers"}, 1),
        ("compute", {"view": "Value of a latent step"}, 1),
        ("compute", {"view": "Size and data"}, 1),
        ("sensitivity", {}, 3),
        ("halting", {}, 7),
        ("tokens", {}, 2),
    ],
)
def test_a_page_of_a_thousand_runs(benchmark, name, query, figures):
    page = open_page(name, **query)
    assert {key: str(page.session_state[key]).replace("True", "true") for key in query} == query
    assert page.title[0].value == TITLES[name]
    assert f"{RUNS} finished" in text(page)
    assert not page.error
    specs = [chart.proto.spec for chart in page.get("plotly_chart")]
    assert len(specs) >= figures
    counts = [benchmark.points(spec) for spec in specs]
    assert all(0 < count <= 10_000 for count in counts), counts


def test_a_filter_of_a_thousand_runs(benchmark):
    page = open_page("compute")
    whole = benchmark.points(page.get("plotly_chart")[0].proto.spec)
    page.pills(key="method").set_value(["vanilla"]).run()
    assert not page.exception
    assert 0 < benchmark.points(page.get("plotly_chart")[0].proto.spec) < whole / 4
