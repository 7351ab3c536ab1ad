"""Sphinx extension: a search that opens at the place.

Sphinx finds pages, and cuts their excerpts out of menus and all. Here each section is
found by itself: sections.js lists them with their text, as it stands in the pages, and
search.js looks through it. Both are plain scripts, so the search works from a folder too.
"""

import json
import re
from pathlib import Path

from bs4 import BeautifulSoup

SPHINX = re.compile(
    r'<script[^>]*(?:searchtools|language_data|searchindex)\.js[^>]*>\s*</script>\s*'
    r'|<script>\s*Search\.loadIndex.*?</script>\s*|<link rel="preload"[^>]*searchindex[^>]*>\s*',
    re.S,
)
OURS = """<script src="_static/sections.js"></script>
<script defer src="_static/search.js"></script>
"""


BLOCKS = ["p", "li", "td", "th", "tr", "div", "pre", "dt", "dd", "br", "figure", "details"]


def text(node):
    """Its words, those of neighbouring paragraphs and cells apart."""
    for block in node.find_all(BLOCKS):
        block.append(" ")
    return " ".join(node.get_text().split())


def sections(html):
    """[anchor, heading, text] of each section of a page, the page's own first."""
    article = BeautifulSoup(html, "html.parser").find("article")
    found = []
    for noise in article.select("a.headerlink, script, style, button, summary, .parts"):
        noise.decompose()
    for section in reversed(article.find_all("section")):  # the inner before the outer
        heading = section.find(re.compile("^h[1-6]$"))
        if heading is None:
            continue
        name = text(heading)
        heading.decompose()
        found.append([section.get("id", ""), name, text(section)])
        section.decompose()
    return found[::-1]


def write_sections(app, error):
    if error or app.builder.format != "html":
        return
    out, entries = Path(app.outdir), []
    for page in app.env.found_docs:
        file = app.builder.get_target_uri(page)
        parts = sections((out / file).read_text(encoding="utf-8"))
        for anchor, heading, words in parts:
            entries.append([f"{file}#{anchor}", parts[0][1], heading, words])
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in sorted(entries))
    (out / "_static" / "sections.js").write_text(
        f"const SECTIONS = [\n{lines}\n];\n", encoding="utf-8"
    )
    page = out / "search.html"
    html = SPHINX.sub("", page.read_text(encoding="utf-8"))
    page.write_text(html.replace("</head>", f"{OURS}</head>"), encoding="utf-8")
    for name in ("searchindex.js", "_static/searchtools.js", "_static/language_data.js"):
        (out / name).unlink(missing_ok=True)


def setup(app):
    app.connect("build-finished", write_sections)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
