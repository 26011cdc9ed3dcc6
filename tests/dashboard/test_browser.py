"""The dashboard as a reader meets it: a real server, a real browser, a store that grows."""

import http.server
import os
import threading
from urllib.parse import urlsplit

import pytest
from pages import TITLES

from haltscale.dashboard import html_report

pytestmark = pytest.mark.browser
STUDY = "quick"


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
    with browser.server(author.store.root) as address, browser.browser_page(f"{address}/compute?size=0.6m") as page:
        # A link restores its view: three runs pass the filter. Taking the filter away shows all.
        browser.settled(page)
        markers = page.locator('[data-testid="stPlotlyChart"] .scatterlayer .points path.point')
        page.get_by_text("3 finished").wait_for()
        page.get_by_test_id("stSidebar").get_by_role("button", name="0.6m").click()
        page.get_by_text("9 finished").wait_for()
        page.wait_for_function("() => !location.search.includes('size=')")
        browser.settled(page)
        assert markers.count() >= len(keys)
        page.get_by_text("training FLOPs, realised", exact=True).wait_for()

        # Pointing at a run names it.
        markers.first.hover(force=True)
        page.locator(".hoverlayer .hovertext").first.wait_for()
        assert "nats/token" in "".join(page.locator(".hoverlayer").all_text_contents())

        # Another kind of FLOPs: the axis says so, and so does the address.
        page.get_by_role("radio", name="paper").or_(page.get_by_role("button", name="paper", exact=True)).first.click()
        page.get_by_text("training FLOPs, paper", exact=True).wait_for()
        page.wait_for_url("**flops=paper**")

        # The data behind the figure is a file.
        page.get_by_test_id("stPopover").get_by_role("button", name="Download").first.click()
        with page.expect_download() as download:
            page.get_by_role("button", name="Data, CSV").click()
        lines = download.value.path().read_text().splitlines()
        assert len(lines) == len(keys) + 1
        assert "flops_realised" in lines[0]
        page.keyboard.press("Escape")

        # Every token carries its number of latent steps; a click pins it.
        page.get_by_role("link", name="Tokens").click()
        tokens = page.locator(".token")
        tokens.first.wait_for()
        numbers = page.locator(".token .count").all_inner_texts()
        assert len(numbers) > 50
        assert set(numbers) <= {"0", "1", "2", "3"}
        tokens.nth(5).click()
        page.locator(".panel", has_text="position5").wait_for()
        assert tokens.nth(5).get_attribute("aria-selected") == "true"
        tokens.first.focus()
        page.keyboard.press("ArrowRight")
        page.locator(".panel", has_text="position1").wait_for()
        assert "NLL" in page.locator(".panel").inner_text()

        # A run that is added to the store appears by itself: the page that was loaded is still the one on show.
        page.get_by_role("link", name="Compute").click()
        page.get_by_text("9 finished").wait_for()
        page.evaluate("window.theSamePage = true")
        author.whole_run("newcomer", method="looped", size="4.2m", lam=None)
        author.plan([*keys, "newcomer"])
        page.get_by_text("10 finished").wait_for()
        page.locator(".legendtext", has_text="other runs").wait_for()  # not of the comparison that is highlighted
        page.get_by_test_id("stSidebar").get_by_role("button", name="looped").wait_for()
        assert page.evaluate("window.theSamePage") is True


@pytest.mark.parametrize("dark", [False, True])
def test_no_page_has_serious_barriers(author, browser, dark):
    from axe_playwright_python.sync_playwright import Axe

    author.troubled_study()
    pages = tuple(TITLES)
    found: dict[str, list[str]] = {}
    with browser.server(author.store.root) as address, browser.browser_page(address, dark=dark) as page:
        for name in pages:
            page.goto(f"{address}/{'' if name == 'answer' else name}")
            browser.settled(page)
            for _ in range(3):  # an element that is being drawn again is faint for a moment
                violations = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
                serious = [one for one in violations if one["impact"] in ("serious", "critical")]
                if not serious:
                    break
                browser.settled(page)
            found |= {name: [f"{one['id']}: {one['nodes'][0]['html'][:300]}" for one in serious]} if serious else {}
    assert not found, "\n".join(f"{name}: {one}" for name, every in found.items() for one in every)


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


def test_a_report_opens_from_the_disk_alone(author, browser, tmp_path):
    author.finished_study()
    out = tmp_path / "report.html"
    assert html_report.main([STUDY, "--out", str(out), "--store", author.store.root]) == 0
    with browser.browser_page("about:blank") as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(out.as_uri())
        page.wait_for_function(
            """() => {
                const figures = [...document.querySelectorAll('figure')]
                return figures.length && figures.every(figure => figure.querySelector('.main-svg'))
            }"""
        )
        assert page.locator(".scatterlayer .points path.point").count() >= 3
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


IMAGE = "![look](http://127.0.0.1:{port}/{where}.png)"


def test_no_text_of_the_store_makes_a_page_fetch_anything(author, browser):
    """Names that are Markdown with an image, wherever a document can hold one: nobody is asked for it."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    author.finished_study()
    for index, key in enumerate(("hostile-a", "hostile-b")):
        image = {where: IMAGE.format(port=listener.server_port, where=where) for where in ("method", "size", "label")}
        author.whole_run(key, method="adaptive", size="1.8m", lam=0.3 + index)
        for name in ("spec", "record"):
            path = author.store.path(STUDY, key, f"{name}.json")
            document = author.store.read_json(path)
            identity = {**document["identity"], "method": image["method"], "size": image["size"] + str(index)}
            author.store.write_json(path, {**document, "label": image["label"], "identity": identity})
    complaints: list[str] = []
    with (
        browser.server(author.store.root) as address,
        browser.browser_page("about:blank", complaints=complaints) as page,
    ):
        hosts: set[str | None] = set()
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        drawn = {
            "": "h1",
            "studies": '[data-testid="stDataFrame"] canvas',
            "compute": '[data-testid="stPlotlyChart"] .scatterlayer .points path',
            "sensitivity": '[data-testid="stPlotlyChart"] .main-svg',
            "halting": '[data-testid="stPlotlyChart"] .barlayer .point path',
            "tokens": ".token .piece",
            "evaluations": "h1",
            "method": "h1",
        }
        for name, what in drawn.items():
            page.goto(f"{address}/{name}")
            browser.settled(page)
            page.locator(what).first.wait_for(state="attached")  # the policy lets a page have all that it needs
            assert page.locator('[data-testid="stMain"] img[src^="http://127.0.0.1"]').count() == 0
        assert complaints == []
        assert hosts - {None, ""} == {"127.0.0.1"}
        # And were something to be drawn as markup after all, the policy of the page stops it.
        leak = f"http://127.0.0.1:{listener.server_port}/leak.png"
        assert page.evaluate("url => fetch(url).then(() => 'sent', () => 'stopped')", leak) == "stopped"
    assert any("Content Security Policy" in one for one in complaints)
    listener.shutdown()
    thread.join()
    listener.server_close()
    assert asked == []
