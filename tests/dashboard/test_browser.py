"""The dashboard as a reader meets it: a real server, a real browser, a store that grows."""

import os

import pytest

pytestmark = pytest.mark.browser


@pytest.fixture
def browser(tools):
    """The tools, when there is a browser to drive."""
    if tools.find_chromium() is None:
        reason = f"no browser found (looked for {', '.join(tools.CHROMIUM)})"
        if os.environ.get("HALTSCALE_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{reason}, and HALTSCALE_REQUIRE_BROWSER=1 asks for one")
        pytest.skip(f"{reason}; install Debian's chromium to run this")
    return tools


def test_a_reader_follows_a_growing_study(author, browser):
    keys = author.finished_study()
    with browser.server(author.store.root) as address, browser.browser_page(address) as page:
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))

        # The figure is drawn, with a marker for every run.
        browser.settled(page)
        markers = page.locator('[data-testid="stPlotlyChart"] .scatterlayer .points path.point')
        markers.first.wait_for()
        assert page.locator(".js-plotly-plot .scatterlayer .trace.scatter").count() >= 6
        drawn = markers.count()
        assert drawn >= len(keys)
        page.get_by_text("training FLOPs, realised", exact=True).wait_for()

        # Another kind of FLOPs: the axis says so, and so does the address.
        page.get_by_role("radio", name="paper").or_(page.get_by_role("button", name="paper", exact=True)).first.click()
        page.get_by_text("training FLOPs, paper", exact=True).wait_for()
        page.wait_for_url("**flops=paper**")

        # Every token carries its number of latent steps.
        page.get_by_role("link", name="Tokens").click()
        tokens = page.locator(".token")
        tokens.first.wait_for()
        numbers = page.locator(".token .count").all_inner_texts()
        assert len(numbers) > 50
        assert set(numbers) <= {"0", "1", "2", "3"}
        tokens.first.focus()
        page.keyboard.press("ArrowRight")
        page.locator(".panel", has_text="position1").wait_for()
        assert "NLL" in page.locator(".panel").inner_text()

        # A run that is added to the store appears by itself: the page that was loaded is still the one on show.
        page.get_by_role("link", name="Scaling").click()
        page.get_by_text("9 finished").wait_for()
        page.evaluate("window.theSamePage = true")
        author.whole_run("newcomer", method="looped", size="4.2m", lam=None)
        author.plan([*keys, "newcomer"])
        page.get_by_text("10 finished").wait_for()
        page.locator(".legendtext", has_text="looped").wait_for()
        page.get_by_test_id("stSidebar").get_by_role("button", name="looped").wait_for()
        assert page.evaluate("window.theSamePage") is True
        assert not errors


def test_hostile_tokens_are_only_text(author, browser, nasty):
    author.whole_run("k")
    author.probe("k", step=500, histogram=[0.25] * 4, words=nasty)
    author.plan(["k"])
    with browser.server(author.store.root) as address, browser.browser_page(f"{address}/tokens", dark=True) as page:
        dialogs: list[str] = []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.locator(".token").first.wait_for()
        pieces = page.locator(".token .piece").all_text_contents()
        assert len(pieces) == len(nasty)
        assert pieces[0] == "<script>alert(1)</script>"
        assert page.locator(".token script, .token b, .token code").count() == 0
        assert not dialogs


def test_an_empty_store_fills_without_a_reload(author, browser):
    with browser.server(author.store.root) as address, browser.browser_page(address) as page:
        page.get_by_text("No study yet").wait_for()
        page.get_by_text("make study").wait_for()
        page.evaluate("window.theSamePage = true")
        author.whole_run("first")
        author.plan(["first"])
        page.get_by_text("1 finished").wait_for()
        assert page.evaluate("window.theSamePage") is True
