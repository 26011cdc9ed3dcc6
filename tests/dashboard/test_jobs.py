"""The jobs that an analyst comes for, in a real browser: light, dark and on a phone."""

import os
from itertools import pairwise

import pytest
from pages import TITLES

from haltscale.dashboard import export
from haltscale.dashboard.notes import Notes

pytestmark = pytest.mark.browser
STUDY = "quick"


@pytest.fixture
def browser(tools, monkeypatch, tmp_path):
    """The tools, when there is a browser to drive; caches and notes in a folder of the test."""
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "home"))
    if tools.find_chromium() is None:
        if os.environ.get("HALTSCALE_REQUIRE_BROWSER") == "1":
            pytest.fail("no browser found, and HALTSCALE_REQUIRE_BROWSER=1 asks for one")
        pytest.skip("no browser found; install Debian's chromium to run this")
    return tools


def test_from_the_answer_to_the_figure_of_the_paper_and_into_the_report(author, browser):
    author.finished_study()
    with browser.server(author.store.root) as address, browser.browser_page(address) as page:
        # The first view answers in a sentence, with its interval.
        page.get_by_role("heading", name="At equal").wait_for()
        assert "nats/token" in page.get_by_role("heading", name="At equal").inner_text()

        # One click further: why. Laws that cannot be fitted are refused in words, and the points stay.
        page.get_by_role("link", name="Compute").click()
        page.get_by_role("heading", name="Loss against training compute").wait_for()
        browser.settled(page)
        page.get_by_text("Fitted laws").click()
        page.get_by_text("Not fitted").wait_for()
        page.wait_for_url("**fits=true**")
        assert page.locator('[data-testid="stPlotlyChart"] .scatterlayer .points path.point').count() >= 9

        # The figure for the paper.
        page.get_by_test_id("stPopover").get_by_role("button", name="Download").first.click()
        if export.can_draw():
            with page.expect_download() as download:
                page.get_by_role("button", name="SVG, single column").click()
            drawn = download.value.path().read_text()
            assert 'width="3.5' in drawn[:400]
            assert '"study": "quick"' in drawn
        else:
            page.get_by_text("need kaleido").wait_for()
        page.keyboard.press("Escape")

        # The link has the study and the choices; the view is pinned with a text that stays text.
        page.get_by_role("button", name="Link and pin").click()
        page.get_by_text("compute?study=quick").wait_for()
        page.get_by_label("Title").fill("Compute <b>bold</b>")
        page.get_by_label("Text", exact=True).fill("What **compute** buys")
        page.get_by_role("button", name="Pin to the report").click()
        page.get_by_text("Pinned. The page Report lists it.").wait_for()
        page.keyboard.press("Escape")
        (note,), _ = Notes(author.store, STUDY).all()
        assert (note.page, note.query["fits"], note.query["study"]) == ("compute", ["true"], [STUDY])

        page.get_by_role("link", name="Report").click()
        page.get_by_role("heading", name="1. Compute <b>bold</b>").wait_for()
        page.get_by_text("What **compute** buys").wait_for()
        page.get_by_role("link", name="Open the view").click()
        page.get_by_role("heading", name="Loss against training compute").wait_for()
        page.get_by_text("Not fitted").wait_for()


@pytest.mark.parametrize("dark", [False, True])
def test_every_page_fits_a_phone_has_its_headings_in_order_and_says_what_it_answers(author, browser, dark):
    author.troubled_study()
    wrong = []
    with (
        browser.server(author.store.root) as address,
        browser.browser_page(address, dark=dark, width=390, height=844) as page,
    ):
        for name, title in TITLES.items():
            page.goto(f"{address}/{'' if name == 'answer' else name}")
            browser.settled(page)
            levels = page.evaluate(
                "[...document.querySelectorAll('[data-testid=stMain] :is(h1, h2, h3, h4)')].map(h => +h.tagName[1])"
            )
            if levels[:1] != [1] or any(b - a > 1 for a, b in pairwise(levels)):
                wrong.append(f"{name}: headings {levels}")
            if page.locator("h1").first.inner_text() != title:
                wrong.append(f"{name}: title {page.locator('h1').first.inner_text()}")
            if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
                wrong.append(f"{name}: wider than the screen")
            says = page.get_by_test_id("stMain").get_by_test_id("stCaptionContainer").first.inner_text()
            if not says.rstrip().endswith("?"):
                wrong.append(f"{name}: does not say what it answers")
    assert not wrong, "\n".join(wrong)
