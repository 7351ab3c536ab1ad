"""Sphinx extension: the book needs no other host, and no server either: it opens from a folder.

Equations are set by a MathJax that lies beside the pages. Two things go that a browser refuses to a page opened from a
file: the theme's font preloads (the icons come from a script anyway), and the excerpts under search results.
"""

import re
from importlib.resources import files
from pathlib import Path
from shutil import copyfile

MATHJAX = "tex-svg-full.js"  # one file: every TeX extension, and the letters as SVG paths instead of web fonts

PRELOAD = re.compile(rb'<link rel="preload" as="font"[^>]*>\r?\n?')


def copy_mathjax(app):
    target = Path(app.outdir) / "_static" / "mathjax"
    target.mkdir(parents=True, exist_ok=True)
    copyfile(files("sphinx-mathjax-offline") / "static" / "mathjax" / MATHJAX, target / MATHJAX)


def drop_preloads(app, error):
    for page in Path(app.outdir).rglob("*.html"):
        page.write_bytes(PRELOAD.sub(b"", page.read_bytes()))


NO_EXCERPTS = 'if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false'


def setup(app):
    app.config.mathjax_path = f"mathjax/{MATHJAX}"
    app.add_js_file(None, body=NO_EXCERPTS)
    app.connect("builder-inited", copy_mathjax)
    app.connect("build-finished", drop_preloads)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
