"""Pages of the dashboard from its entry point, in process."""

import json
from pathlib import Path

from streamlit.testing.v1 import AppTest

import haltscale.dashboard

FOLDER = Path(haltscale.dashboard.__file__).parent
TITLES = {
    "answer": "Answer",
    "compute": "Loss against training compute",
    "sensitivity": "Sensitivity",
    "halting": "Allocation of latent steps",
    "tokens": "Token by token",
    "cost": "Cost",
    "evaluations": "Evaluations",
    "live": "Live runs",
    "studies": "Studies",
    "notes": "Report",
    "playground": "Playground",
    "method": "Methods and definitions",
}
PAGES = tuple(TITLES)


def open_page(name: str, **query: str | list[str]) -> AppTest:
    page = AppTest.from_file(str(FOLDER / "app.py"), default_timeout=60)
    for key, value in query.items():
        page.query_params[key] = value
    page.run()
    page.switch_page(f"app_pages/{name}.py").run()
    assert not page.exception
    return page


def text(page: AppTest) -> str:
    """Everything a reader would read."""
    kinds = (page.title, page.header, page.subheader, page.markdown, page.caption)
    kinds += (page.info, page.warning, page.error, page.code)
    return "\n".join(str(element.value) for kind in kinds for element in kind).replace("\\", "")


def charts(page: AppTest) -> list[dict]:
    return [json.loads(chart.proto.spec) for chart in page.get("plotly_chart")]
