"""One browser for the tests of a file, and the built book, from a folder and from a server.

Needs the book (`make site`), Playwright and a Chromium: Debian's, or the one that
MEMTX_CHROMIUM names. Playwright is told to download none. Where one of the three is
missing the tests are skipped and say which.
"""

import functools
import http.server
import threading

import checks
import pdf
import pytest

HTML = pdf.BUILD / "html"


@pytest.fixture(scope="module")
def browser():
    """Chromium, started once for the tests of a file."""
    reason = "no Playwright: pip install -r requirements.txt"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    if not (path := pdf.chromium()):
        pytest.skip("no Chromium: apt-get install chromium, or name one in MEMTX_CHROMIUM")
    with playwright.sync_playwright() as driver:
        chromium = pdf.launch(driver, path)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def html():
    """The folder of the built book."""
    if not (HTML / "index.html").is_file():
        pytest.skip("the book is not built: make site")
    return HTML


@pytest.fixture(scope="module")
def folder(html):
    """The address of the book opened from its folder."""
    return html.as_uri()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(html):
    """The address of the book on a server, as in `f"{site}/index.html"`."""
    handler = functools.partial(Quiet, directory=html)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def page(browser):
    """An empty page, 1280 x 800 px. The test fails if anything went wrong on it."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(120_000)  # other programs may be busy
    faults = checks.watch(page)
    yield page
    context.close()
    assert not faults
