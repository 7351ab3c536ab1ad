"""The pages put together for print: links lead inside, and the contents know their pages."""

import pdf
import pytest
from bs4 import BeautifulSoup

HEAD = '<link rel="stylesheet" href="{0}_static/book.css">'
PAGES = {
    "index": HEAD.format("") + '<article><section id="book"><h1>Book</h1>'
    '<a href="notebooks/one.html#here">there</a> <a href="book/code.html">code</a>'
    '<a href="https://example.org/">out</a><img src="data:image/png;base64,AA"></section></article>',
    "notebooks/one": HEAD.format("../")
    + """<script>window.MathJax = {}</script>
<script defer src="../_static/mathjax/startup.js"></script>
<article><section id="one"><h1>One</h1><section id="here"><h2>Here</h2><img src="../_images/a.png">
<a href="../index.html">back</a> <a href="#here">up</a><details class="hide">code</details>
<details><summary>Answer</summary>42</details></section></section></article>""",
}


@pytest.fixture
def merged(tmp_path):
    for page, html in PAGES.items():
        path = tmp_path / f"{page}.html"
        path.parent.mkdir(exist_ok=True)
        path.write_text(html, encoding="utf-8")
    html = pdf.merge(tmp_path, list(PAGES), {"index": 3, "notebooks-one--here": 7})
    return BeautifulSoup(html, "html.parser")


def test_links_lead_inside(merged):
    ids = {tag["id"] for tag in merged.find_all(id=True)}
    links = [a["href"] for a in merged.select(".page a[href]")]
    assert links == [
        "#notebooks-one--here", "https://example.org/", "#index", "#notebooks-one--here"
    ]  # fmt: skip
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    assert "code" in merged.select_one("#index").get_text()  # the page is not there, its name is


def test_contents(merged):
    lines = [a.get_text(" ") for a in merged.select("nav a")]
    assert [line.strip() for line in lines] == ["Book 3", "One", "Here 7"]
    assert [a["href"] for a in merged.select("nav a")][2] == "#notebooks-one--here"
    assert all(len(a.find_all("span", recursive=False)) == 2 for a in merged.select("nav a"))  # or flex eats the spaces around a formula


def test_what_is_loaded_and_what_is_left_out(merged):
    assert [link["href"] for link in merged.select("link[href]")] == ["_static/book.css"]
    assert [img["src"] for img in merged.find_all("img")] == ["data:image/png;base64,AA", "_images/a.png"]
    assert merged.select_one("script[src]")["src"] == "_static/mathjax/startup.js"
    assert not merged.select("details.hide")
    assert [details.has_attr("open") for details in merged.select("details")] == [True]


def test_page_numbers():
    """As Chromium writes them: pages in a tree, places by name."""
    objects = [
        b"<</Type /Catalog\n/Pages 2 0 R>>",
        b"<</Type /Pages\n/Count 3\n/Kids [3 0 R 6 0 R]>>",
        b"<</Type /Pages\n/Count 2\n/Kids [4 0 R 5 0 R]>>",
        b"<</Type /Page>>", b"<</Type /Page>>", b"<</Type /Page>>",
        b"<</one [4 0 R /XYZ 0 842 0]\n/two#20b [6 0 R /XYZ 0 10 0]>>",
    ]  # fmt: skip
    data = b"%PDF-1.4\n" + b"\n".join(
        b"%d 0 obj\n%s\nendobj" % (n, body) for n, body in enumerate(objects, 1)
    )
    assert pdf.page_numbers(data) == {"one": 1, "two b": 3}


def test_the_order_is_that_of_the_book():
    pages = pdf.pages()
    assert pages[0] == "index" and pages[1] == "notebooks/00_attention"
    assert not set(pdf.ONLINE) & set(pages)
