"""One browser for the tests of a file, and the built book, from a folder and from a server.

Needs the book (`make site`), Playwright and a Chromium: Debian's, or the one that
MEMTX_CHROMIUM names. Playwright is told to download none. Where one of the three is
missing the tests are skipped and say which.
"""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest

HTML = Path(__file__).resolve().parents[2] / "book/_build/html"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# No host but this machine can be reached, and Chromium asks none by itself.
FLAGS = [
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--disable-gpu",
    "--no-first-run",
    "--force-color-profile=srgb",
]


@pytest.fixture(scope="module")
def browser():
    """Chromium, started once for the tests of a file."""
    reason = "no Playwright: pip install -r requirements.txt"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = os.environ.get("MEMTX_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), "")
    if not path:
        pytest.skip("no Chromium: apt-get install chromium, or name one in MEMTX_CHROMIUM")
    # Its sandbox refuses root, who runs the tests in containers.
    sandbox = not hasattr(os, "geteuid") or os.geteuid() != 0
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=path, args=FLAGS, chromium_sandbox=sandbox
        )
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


def watch(page):
    """A list to which is added whatever goes wrong on a page."""
    faults = []
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on(
        "console",
        lambda said: said.type in ("error", "warning")
        and faults.append(f"{said.type}: {said.text} {said.location.get('url', '')}"),
    )
    page.on("requestfailed", lambda r: faults.append(f"failed: {r.url} {r.failure}"))
    page.on(
        "response",
        lambda r: r.status >= 400 and faults.append(f"status {r.status}: {r.url}"),
    )
    return faults


@pytest.fixture
def page(browser):
    """An empty page, 1280 x 800 px. The test fails if anything went wrong on it."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    faults = watch(page)
    yield page
    context.close()
    assert not faults
