"""What a page says of itself where it is shared, and what stands where no page is."""

import os
import subprocess
import sys

import pytest
import sync
from bs4 import BeautifulSoup
from check_pages import check

PAGES = {
    "index.rst": """The book
========

It says what it is about in a sentence that is long enough to be shown.
A second one, "quoted" & <marked>, fits too.
A third one does not, since with it the words would be too many to be shown where a book is shared.

.. toctree::

   chapter
   words
""",
    "chapter.rst": f"""1. One *fine* chapter
=====================

{sync.BADGES}

- No paragraph of a list is taken, however long it may be, and this one is long.

{"A sentence without an end " * 20}
""",
    "words.rst": "Words\n=====\n\nShort.\n",
}
CONF = """project = html_title = "The book"
extensions = ["sphinx_book_theme", "sharing"]
html_theme = "sphinx_book_theme"
html_theme_options = {{
    "repository_url": "{url}", "repository_branch": "main",
    "use_repository_button": True, "use_edit_page_button": True,
}}
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
"""
NOWHERE = "https://github.com/no_address_yet/book"
REAL = "https://github.com/someone/book"
SITE = "https://someone.github.io/book/"


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A small book, rendered for an address: {page: what it holds}, and its folder."""

    def build(url):
        source = tmp_path_factory.mktemp("book")
        (source / "_static").mkdir()
        icon = (sync.ROOT / "book/_static/favicon.svg").read_bytes()
        (source / "_static/favicon.svg").write_bytes(icon)
        for name, text in {"conf.py": CONF.format(url=url), **PAGES}.items():
            sync.write(source / name, text)
        paths = [str(sync.ROOT / "book/_ext"), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-m", "sphinx", "-q", "-W", source, source / "html"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        subprocess.run(command, env=environment, check=True)
        pages = sorted((source / "html").glob("*.html"))
        return source / "html", {
            page.stem: BeautifulSoup(sync.read(page), "html.parser") for page in pages
        }

    return build


@pytest.fixture(scope="module")
def placeholder(build):
    return build(NOWHERE)


@pytest.fixture(scope="module")
def real(build):
    return build(REAL)


def tags(page):
    """{name: content} of the meta tags of a page."""
    metas = page.find_all("meta", content=True)
    return {meta.get("property") or meta.get("name"): meta["content"] for meta in metas}


def test_title_and_description(placeholder):
    _, pages = placeholder
    assert pages["index"].title.text == "The book"
    assert pages["chapter"].title.text.startswith("1. One fine chapter — The book")
    words = tags(pages["index"])["description"]
    assert words.startswith("It says what it is about") and len(words) <= 200
    assert words.endswith("A second one, “quoted” & <marked>, fits too.")
    words = tags(pages["chapter"])["description"]
    assert words.startswith("A sentence without an end A") and words.endswith(" …")
    assert len(words) <= 200
    assert "one notebook" in tags(pages["words"])["description"]


def test_open_graph_without_an_address(placeholder):
    _, pages = placeholder
    found = tags(pages["chapter"])
    assert found["og:title"] == "1. One fine chapter"
    assert found["og:site_name"] == "The book" and found["og:type"] == "article"
    assert found["og:description"] == found["description"]
    assert not {"og:url", "og:image"} & set(found)  # these are read in full only


def test_open_graph_with_an_address(real):
    _, pages = real
    found = tags(pages["chapter"])
    assert found["og:url"] == SITE + "chapter.html"
    assert found["og:image"] == SITE + "_static/readme.png"
    assert (sync.ROOT / "book/_static/readme.png").is_file()
    assert found["og:image:alt"] and found["twitter:card"]
    canonical = pages["chapter"].find("link", rel="canonical")
    assert canonical["href"] == SITE + "chapter.html"
    assert tags(pages["index"])["og:type"] == "website"


def test_nothing_leads_to_an_address_that_is_none(placeholder):
    _, pages = placeholder
    assert not [name for name, page in pages.items() if "github" in str(page).lower()]


def test_edit_this_page(real):
    _, pages = real
    edit = pages["chapter"].find("a", href=REAL + "/edit/main/chapter.rst")
    assert "Edit this page" in edit.text


def test_a_notebook_is_edited_as_its_script(monkeypatch):
    monkeypatch.syspath_prepend(sync.ROOT / "book/_ext")
    import sharing

    edit = {"label": "source-edit-button", "url": f"{REAL}/edit/main/notebooks/1.ipynb"}
    context = {"header_buttons": [{"label": "source-buttons", "buttons": [edit]}]}
    sharing.edit_the_script(None, "1", "page.html", context, None)
    assert edit["url"] == f"{REAL}/edit/main/notebooks/1.py"
    edit["url"] = f"{REAL}/edit/main/index.md"
    sharing.edit_the_script(None, "index", "page.html", context, None)
    assert edit["url"] == f"{REAL}/edit/main/book/intro.md"


@pytest.mark.parametrize("book", ["placeholder", "real"])
def test_the_page_for_missing_pages(book, request):
    """It is shown under any address, so it needs no file beside it."""
    folder, pages = request.getfixturevalue(book)
    page = pages["404"]
    assert [a["href"] for a in page.find_all("a")] == [
        "index.html", "chapter.html", "words.html", "search.html"
    ]  # fmt: skip
    base = page.find("base")
    assert base["href"] == SITE if book == "real" else base is None
    assert not page.find_all(["script", "img"])
    assert all(link["href"].startswith("data:") for link in page.find_all("link"))
    problems = [p for p in check(folder)[0] if p.startswith("404")]
    assert not problems


def test_the_icon(placeholder):
    folder, pages = placeholder
    icon = pages["chapter"].find("link", rel="icon")
    assert (folder / icon["href"]).is_file()
