"""Each check of the built pages can fail: a small page that is fine, and one change at a time that is not."""

import io
import sys

import check_pages
import pytest

PAGE = """<html><head><link rel="stylesheet" href="style.css"><script src="script.js"></script></head><body><article>
<h1 id="top">A page</h1> <a href="other.html#there">there</a> <a href="#top">up</a> <a href="https://example.org/">a site</a>
<img src="picture.png" alt="A line that falls."> <p>Text.</p> <pre>```{note}</pre></article></body></html>"""


@pytest.fixture
def book(tmp_path):
    for name in ("style.css", "script.js", "picture.png"):
        (tmp_path / name).touch()
    other = '<html><body><p id="there">Here.</p></body></html>'
    (tmp_path / "other.html").write_text(other, encoding="utf-8")
    (tmp_path / "index.html").write_text(PAGE, encoding="utf-8")
    return tmp_path


def test_a_page_without_problems(book):
    problems, count = check_pages.check(book)
    assert not problems
    assert count == {"pages": 2, "links": 3, "loads": 3, "pictures": 1}


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("other.html#there", "nowhere.html", "the link nowhere.html leads to no file"),
        ("other.html#there", "other.html#nowhere", "leads to no such anchor"),
        ("#top", "#bottom", "the link #bottom leads to no such anchor"),
        ("<head>", '<head><meta http-equiv="Refresh" content="0; url=gone.html">', "the redirection to gone.html leads to no file"),
        ('"script.js"', '"https://cdn.example.org/x.js"', "loads https://cdn.example.org/x.js"),
        ('"script.js"', '"//cdn.example.org/x.js"', "loads //cdn.example.org/x.js"),
        ('"style.css"', '"gone.css"', "loads gone.css, which leads to no file"),
        ('rel="stylesheet" href="style.css"', 'rel="preconnect" href="https://fonts.example.org"', "loads https://fonts.example.org"),
        ('src="picture.png"', 'src="https://example.org/badge.svg"', "loads https://example.org/badge.svg"),
        ('src="picture.png"', 'src="picture.png" srcset="https://example.org/2.png 2x"', "loads https://example.org/2.png"),
        ("<head>", "<head><style>@import 'https://example.org/a.css';</style>", "loads https://example.org/a.css in a style"),
        ("<p>", "<p style=\"background: url('https://example.org/b.png')\">", "loads https://example.org/b.png in a style"),
        ("<head>", '<head><script>const url = "https://cdn.example.org/t.js"</script>', "https://cdn.example.org/t.js in an inline script"),
        ('alt="A line that falls."', 'alt=" "', "picture.png has no alt text"),
        ('alt="A line that falls."', "", "picture.png has no alt text"),
        ("Text.", "{term}`segment`", "shows markup"),
        ("Text.", "```{note}", "shows markup"),
        ("<p>Text.", '<p class="system-message">Oh.', "shows an error of the renderer"),
    ],
)
def test_one_problem(book, old, new, problem):
    assert old in PAGE
    (book / "index.html").write_text(PAGE.replace(old, new, 1), encoding="utf-8")
    problems, _ = check_pages.check(book)
    assert len(problems) == 1 and problems[0].startswith("index.html: ") and problem in problems[0]


@pytest.mark.parametrize(
    "name, text",
    [("style.css", "@font-face { src: url(https://example.org/f.woff2) }"), ("script.js", 'fetch("https://example.org/data.json")')],
)
def test_what_the_page_brings_along(book, name, text):
    (book / name).write_text(text, encoding="utf-8")
    problems, _ = check_pages.check(book)
    assert len(problems) == 1 and problems[0].startswith(f"{name}: loads https://example.org/")


def test_a_problem_that_the_terminal_cannot_show(book, monkeypatch):
    (book / "index.html").write_text('<a href="π.html">', encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    assert check_pages.main(book)
    sys.stdout.seek(0)
    assert r"the link \u03c0.html leads to no file" in sys.stdout.read()


def test_an_empty_folder_is_no_book(tmp_path):
    assert "no pages" in check_pages.check(tmp_path)[0][0]
    assert check_pages.main(tmp_path) == 1
