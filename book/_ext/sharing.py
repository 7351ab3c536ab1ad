"""Sphinx extension: what a page says of itself where it is shared, found or missing.

Each page gets a description and OpenGraph tags; 404.html is what GitHub Pages shows where
there is no page. Addresses in full appear only once the project has one: until then no
button leads to the repository either.
"""

import re
import sys
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

from docutils import nodes

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import sync  # noqa: E402

PICTURE = "_static/readme.png"
PICTURE_SHOWS = (
    "Validation loss by position in the segment: a vanilla transformer starts every "
    "segment blind, Transformer-XL does not."
)
BADGES = (sync.BADGES[:20], "Open in Colab")  # the line above a chapter's first words
LENGTH = 200  # of a description: what search engines and messengers show
ABOUT = "How transformers remember: one paper, one notebook, one compact PyTorch file."


def address(app):
    return app.config.html_theme_options.get("repository_url", "")


def follow_the_address(app, config):
    if sync.is_real(address(app)):
        config.html_baseurl = sync.site(address(app))
    else:
        for button in ("use_repository_button", "use_edit_page_button"):
            config.html_theme_options[button] = False


def description(doctree):
    """The first words of a page, in whole sentences where they fit."""
    for paragraph in doctree.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        in_prose = isinstance(paragraph.parent, nodes.section)  # in no list, no box
        if in_prose and len(text) > 60 and not text.startswith(BADGES):
            whole = re.match(rf"(.{{40,{LENGTH - 1}}}[.?!])(?: |$)", text)
            return whole[1] if whole else text[: LENGTH - 2].rsplit(" ", 1)[0] + " …"
    return ABOUT


def add_tags(app, pagename, templatename, context, doctree):
    """Description and OpenGraph tags of one page."""
    if doctree is None:
        return
    front = pagename == app.config.root_doc
    book = app.config.html_title
    title = re.sub("<[^>]*>", "", context["title"])  # holds HTML, escaped
    if front:
        context["docstitle"] = ""  # it is the page's title already
    tags = {
        "og:type": "website" if front else "article",
        "og:site_name": escape(book),
        "og:title": title,
        "og:description": escape(description(doctree)),
    }
    if sync.is_real(address(app)):
        site = sync.site(address(app))
        tags["og:url"] = site + app.builder.get_target_uri(pagename)
        tags["og:image"] = site + PICTURE
        tags["og:image:alt"] = escape(PICTURE_SHOWS)
        tags["twitter:card"] = "summary_large_image"
    lines = [f'<meta name="description" content="{tags["og:description"]}" />']
    for name, content in tags.items():
        kind = "name" if name.startswith("twitter") else "property"
        lines.append(f'<meta {kind}="{name}" content="{content}" />')
    context["metatags"] = context.get("metatags", "") + "\n".join(lines) + "\n"


def edit_the_script(app, pagename, templatename, context, doctree):
    """A notebook is edited as its .py: JSON is not for people. The front page is book/intro.md."""
    for button in context.get("header_buttons", []):
        for one in [button, *button.get("buttons", [])]:
            if one.get("label") == "source-edit-button":
                url = one["url"].replace(".ipynb", ".py")
                one["url"] = re.sub(r"/index\.md$", "/book/intro.md", url)
                one["text"] = one["tooltip"] = "Edit this page"


def page_not_found(app):
    """404.html, in one file: shown under any address, it finds no style beside it."""
    env, builder = app.env, app.builder
    pages = env.toctree_includes.get(app.config.root_doc, [])
    titles = {page: env.titles[page].astext() for page in pages}
    real = sync.is_real(address(app))
    icon = (HERE.parent / "_static" / "favicon.svg").read_text(encoding="utf-8")
    return Template((HERE / "404.html").read_text(encoding="utf-8")).substitute(
        base=f'<base href="{sync.site(address(app))}">' if real else "",
        icon=quote(icon),
        book=escape(app.config.html_title),
        front=builder.get_target_uri(app.config.root_doc),
        search=builder.get_target_uri("search"),
        pages="\n".join(
            f'<li><a href="{builder.get_target_uri(page)}">{escape(title)}</a></li>'
            for page, title in titles.items()
        ),
    )


def write_page_not_found(app, error):
    if error is None and app.builder.format == "html":
        (Path(app.outdir) / "404.html").write_text(page_not_found(app), encoding="utf-8")


def setup(app):
    app.connect("config-inited", follow_the_address, priority=100)  # before the theme
    app.connect("html-page-context", add_tags)
    app.connect("html-page-context", edit_the_script, priority=900)  # after the theme
    app.connect("build-finished", write_page_not_found)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
