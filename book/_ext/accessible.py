"""Sphinx extension: what the theme and its helpers leave out for people who do not see the
page or do not use a mouse, mended in the pages. tests/browser asks axe-core what remains.
"""

import re
from pathlib import Path

MENDED = [
    # The column with the search and the chapters is a part of the page, with a name.
    (
        r'<div class="(bd-sidebar-primary[^"]*)"',
        r'<div role="complementary" aria-label="Search and chapters" class="\1"',
    ),
    # What folds is named by the words that it shows.
    (r'<summary aria-label="Toggle hidden content">', "<summary>"),
    # An empty corner of a table heads nothing.
    (r"<th(?: class=\"head\")?([^>]*)>(?:<p></p>)?</th>", r"<td\1></td>"),
    # Buttons without a word in them.
    (
        r'(<button class="sidebar-toggle (?:primary|secondary)-toggle[^>]*)title="([^"]*)"',
        r'\1aria-label="\2" title="\2"',
    ),
    (r'(<button onclick="toggleFullScreen\(\)"[^>]*)title=', r'\1aria-label="Full screen" title='),
]


def mend(app, error):
    if error or app.builder.format != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for pattern, instead in MENDED:
            text = re.sub(pattern, instead, text)
        if page.name == "search.html":  # the same search field stands twice in it
            text = text.replace('id="search-input"', 'id="search-field"', 1)
        page.write_text(text, encoding="utf-8")


def name_the_book(app, config):
    config.html_theme_options["logo"] = {"text": config.html_title or config.project}


def setup(app):
    app.connect("config-inited", name_the_book, priority=100)
    app.connect("build-finished", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
