"""Every page, from a folder and from a server: complete, readable at every width, in both
themes, on paper, and without a violation that axe-core knows."""

import checks
import pytest
import sync
import yaml

TOC = yaml.safe_load(sync.read(sync.ROOT / "book/_toc.yml"))
PAGES = [TOC["root"], *(chapter["file"] for chapter in TOC["chapters"])]
CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]
WIDTHS = (390, 768, 1280, 1920)
MOST = 3_000_000  # bytes of a chapter without its pictures


@pytest.mark.parametrize("name", [*PAGES, "search", "404"])
def test_a_page(page, folder, site, name):
    """From a folder: what is there, at four widths and on paper; from a server: axe."""
    page.goto(f"{folder}/{name}.html")
    assert not checks.equations(page)
    assert not checks.pictures(page)
    assert not checks.lists(page)
    assert not checks.moves(page)
    for width in WIDTHS:
        checks.set_size(page, width)
        assert not checks.wide(page), width
        if width >= 1280:
            assert not checks.wraps(page), width
        if width == 390:
            assert not checks.small(page)
            assert not checks.outdented(page)
            assert not checks.covered(page)
    assert not checks.clipped_in_print(page)
    page.goto(f"{site}/{name}.html" + "?q=memory" * (name == "search"))
    assert not checks.equations(page)
    for width, theme in ((1280, "light"), (390, "dark")):
        checks.set_size(page, width)
        checks.set_theme(page, theme)
        assert not checks.axe(page), (width, theme)
        assert not checks.faint(page), (width, theme)


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_weight_of_a_chapter(page, site, name):
    sizes = {}
    page.on("response", lambda r: sizes.update({r.url: len(r.body())}))
    page.goto(f"{site}/{name}.html", wait_until="networkidle")
    page.wait_for_function("document.querySelector('mjx-container')")
    weight = sum(n for url, n in sizes.items() if not url.endswith((".png", ".gif", ".svg")))
    assert 500_000 < weight < MOST


def test_the_first_paint(page, site):
    """Under a second; the best of three, since other programs may be busy."""
    paints = []
    for _ in range(3):
        page.goto(f"{site}/{CHAPTERS[1]}.html")
        paints.append(
            page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        )
    assert min(paints) < 1000


def test_pages_without_equations_load_no_mathjax(page, site):
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{site}/book/glossary.html", wait_until="networkidle")
    assert asked and not [url for url in asked if "mathjax" in url or "awesome" in url]
