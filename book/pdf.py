"""The whole book as one PDF, book/_build/book.pdf: `make pdf`.

The built pages are put together, in the order of the table of contents, into one page;
links from one to the other become links in it. Chromium prints it twice: once to learn on
which page each section begins, once with these numbers in the table of contents.
"""

import os
import posixpath
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

import sync
import yaml
from bs4 import BeautifulSoup

BUILD = sync.ROOT / "book" / "_build"
ONLINE = ["book/code"]  # pages that repeat what stands in others
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
FOOTER = (
    '<div style="width: 100%; text-align: center; font: 8pt sans-serif; color: #555">'
    '<span class="pageNumber"></span></div>'
)
STYLE = """
body { background: #fff; }
.page { break-before: page; }
.bd-main .bd-content .bd-article h1:first-of-type { display: block; }
.title { text-align: center; padding-top: 6cm; }
.title p { font-size: 13pt; }
nav.whole { break-before: page; }
nav.whole ul { list-style: none; padding-left: 0; }
nav.whole ul ul { padding-left: 1.5em; }
nav.whole li:has(> ul) > a { break-after: avoid; }
nav.whole li > a { display: flex; text-decoration: none; color: inherit; }
nav.whole li > a > .number { margin-left: auto; padding-left: 1em; }
nav.whole > ul > li { margin-top: 0.6em; font-weight: 600; }
nav.whole ul ul { font-weight: 400; }
"""


def chromium():
    """The path of a Chromium: that of MEMTX_CHROMIUM, or an installed one; or None."""
    return os.environ.get("MEMTX_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def launch(driver, path):
    """A browser. Its sandbox refuses root, who runs it in containers."""
    sandbox = not hasattr(os, "geteuid") or os.geteuid() != 0
    return driver.chromium.launch(executable_path=path, args=FLAGS, chromium_sandbox=sandbox)


def pages():
    toc = yaml.safe_load(sync.read(sync.ROOT / "book" / "_toc.yml"))
    return [p for p in [toc["root"], *(c["file"] for c in toc["chapters"])] if p not in ONLINE]


def name(page, anchor=""):
    """The id in the whole of a page or of a place in it."""
    return page.replace("/", "-") + (f"--{anchor}" if anchor else "")


def local(page, address):
    """(path from the root, anchor) of an address in a page; None where it leads elsewhere."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    path = posixpath.join(posixpath.dirname(page), parts.path) if parts.path else f"{page}.html"
    return posixpath.normpath(path), parts.fragment


def article(html, page, whole):
    """The text of a page, its ids and links as they are in the whole."""
    text = BeautifulSoup(html, "html.parser").find("article")
    for noise in text.select("a.headerlink, script, details.hide, .parts, .solution"):
        noise.decompose()
    for tag in text.find_all(id=True):
        tag["id"] = name(page, tag["id"])
    for tag in text.find_all("details"):
        tag["open"] = ""
    for tag in text.find_all("img", src=True):
        if found := local(page, tag["src"]):  # a picture in the page itself stays
            tag["src"] = found[0]
        tag["loading"] = "eager"
    for tag in text.find_all("a", href=True):
        if (found := local(page, tag["href"])) is None:
            continue
        target = found[0].removesuffix(".html")
        if target in whole:
            tag["href"] = f"#{name(target, found[1])}"
        else:
            tag.unwrap()
    text.name = "section"
    text["id"] = name(page)
    text["class"] = ["page"]
    return text


def contents(articles, numbers):
    """The table of contents: the pages and their sections, with the numbers that are known."""
    lines = []

    def line(anchor, heading):
        number = numbers.get(anchor, "")
        return f'<a href="#{anchor}"><span>{heading}</span><span class="number">{number}</span></a>'

    for text in articles:
        sections = text.select("h2")
        inner = "".join(f"<li>{line(h.parent['id'], h.get_text())}</li>" for h in sections)
        title = line(text["id"], text.find("h1").get_text())
        lines.append(f"<li>{title}{f'<ul>{inner}</ul>' if inner else ''}</li>")
    return f'<nav class="whole"><h1>Contents</h1><ul>{"".join(lines)}</ul></nav>'


def merge(folder, whole, numbers=()):
    """The pages of a folder as one: HTML."""
    html = {page: sync.read(folder / f"{page}.html") for page in whole}
    articles = [article(text, page, whole) for page, text in html.items()]
    links, scripts = {}, {}
    for page, text in html.items():
        soup = BeautifulSoup(text, "html.parser")
        for tag in soup.select("link[rel=stylesheet][href]"):
            links[local(page, tag["href"])[0]] = None
        for tag in soup.find_all("script"):
            if "MathJax" in tag.get_text():
                scripts["settings"] = str(tag)
            elif "mathjax" in tag.get("src", ""):
                scripts["mathjax"] = f'<script defer src="{local(page, tag["src"])[0]}"></script>'
    styles = "".join(f'<link rel="stylesheet" href="{link}">' for link in links)
    title = articles[0].find("h1").get_text()
    return f"""<!DOCTYPE html><html lang="en" data-theme="light"><head><meta charset="utf-8">
<title>{title}</title>{styles}<style>{STYLE}</style>{"".join(scripts.values())}</head><body>
<div class="bd-main"><div class="bd-content"><div class="bd-article-container">
<article class="bd-article"><div class="title"><h1>{title}</h1><p>The memtx-minimal authors</p></div>
{contents(articles, dict(numbers))}{"".join(map(str, articles))}</article></div></div></div></body></html>
"""


def page_numbers(pdf):
    """{id: page} of the places in a PDF of Chromium's that links lead to."""
    objects = {
        int(number): body
        for number, body in re.findall(rb"(?:^|\n)(\d+) 0 obj\n(.*?)\nendobj", pdf, re.S)
    }

    def leaves(number):
        body = objects[number]
        if b"/Type /Pages" not in body:
            return [number]
        kids = re.search(rb"/Kids \[([^\]]*)\]", body)[1]
        return [leaf for kid in re.findall(rb"(\d+) 0 R", kids) for leaf in leaves(int(kid))]

    root = next(b for b in objects.values() if b"/Type /Catalog" in b)
    order = leaves(int(re.search(rb"/Pages (\d+) 0 R", root)[1]))
    at = {leaf: i for i, leaf in enumerate(order, 1)}
    places = re.findall(rb"/([^\s/\[\]<>()]+) \[(\d+) 0 R /XYZ", b"\n".join(objects.values()))
    unescape = lambda found: re.sub(rb"#(..)", lambda m: bytes.fromhex(m[1].decode()), found)
    return {unescape(key).decode(): at[int(leaf)] for key, leaf in places if int(leaf) in at}


def print_book(folder, whole, path):
    """The PDF of the pages of a folder, as bytes."""
    from playwright.sync_api import sync_playwright

    merged = folder / "whole.html"
    numbers, pdf = {}, b""
    with sync_playwright() as driver:
        browser = launch(driver, path)
        page = browser.new_page()
        page.set_default_timeout(300_000)
        try:
            for _ in range(2):
                sync.write(merged, merge(folder, whole, numbers))
                page.goto(merged.as_uri())
                page.evaluate("window.MathJax && MathJax.startup.promise.then(() => 0)")
                page.wait_for_function("[...document.images].every((image) => image.complete)")
                pdf = page.pdf(
                    prefer_css_page_size=True, print_background=True, outline=True, tagged=True,
                    display_header_footer=True, header_template="<span></span>", footer_template=FOOTER,
                )  # fmt: skip
                numbers = page_numbers(pdf)
        finally:
            merged.unlink(missing_ok=True)
            browser.close()
    return pdf


def main():
    if not (BUILD / "html" / "index.html").is_file():
        sys.exit("the book is not built: make site")
    if not (path := chromium()):
        sys.exit("no Chromium: apt-get install chromium, or name one in MEMTX_CHROMIUM")
    target = BUILD / "book.pdf"
    part = target.with_suffix(".part")
    part.write_bytes(print_book(BUILD / "html", pages(), path))
    part.replace(target)
    print(f"The book is in {target}")


if __name__ == "__main__":
    main()
