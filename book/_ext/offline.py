"""Sphinx extension: the book needs no other host, and no server either: it opens from a folder.

Equations are set by a MathJax that lies beside the pages. The theme's font preloads go: a browser refuses them in a
page that was opened from a file, and the icons come from a script anyway.
"""

import re
from importlib.resources import files
from pathlib import Path
from shutil import copyfile

MATHJAX = "tex-svg-full.js"  # one file: every TeX extension, and the letters as SVG paths instead of web fonts


def copy_mathjax(app):
    target = Path(app.outdir) / "_static" / "mathjax"
    target.mkdir(parents=True, exist_ok=True)
    copyfile(files("sphinx-mathjax-offline") / "static" / "mathjax" / MATHJAX, target / MATHJAX)


def drop_preloads(app, error):
    for page in Path(app.outdir).rglob("*.html"):
        page.write_text(re.sub(r'<link rel="preload" as="font"[^>]*>\n?', "", page.read_text()))


def setup(app):
    app.config.mathjax_path = f"mathjax/{MATHJAX}"
    app.connect("builder-inited", copy_mathjax)
    app.connect("build-finished", drop_preloads)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
