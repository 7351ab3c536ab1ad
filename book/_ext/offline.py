"""Sphinx extension: the book needs no other host, no server, and little of what its theme
brings along.

Equations are set by a MathJax that lies beside the pages, in the parts that the book
uses: the letters as SVG paths instead of web fonts, no menu. The theme's icons come as
1.6 MB of scripts and styles for a dozen pictures; here each stands in the page itself.
"""

import re
from importlib.resources import files
from pathlib import Path
from shutil import copyfile, rmtree

# In the order of loading. assistive-mml writes each equation as MathML for screen readers.
MATHJAX = [
    "core",
    "input/tex-base",
    "input/tex/extensions/ams",
    "input/tex/extensions/newcommand",
    "output/svg",
    "a11y/assistive-mml",
]
ALSO = ["startup", "output/svg/fonts/tex"]  # the one that loads, and what output/svg loads itself

# The theme's: a browser refuses such preloads to a page that is opened from a folder.
PRELOAD = re.compile(r'<link rel="preload" as="font"[^>]*>\r?\n?')
FONT_AWESOME = re.compile(
    r"<link [^>]*fontawesome[^>]*>\r?\n?|<script [^>]*fontawesome[^>]*></script>\r?\n?"
)
ICON = re.compile(
    r'<(i|span) class="([^"]*\bfa[sbr]? fa-[^"]*|[^"]*\bfa-(?:solid|brands) fa-[^"]*)"'
    r"([^>]*)></\1>"
)


def ask_for_mathjax(app, config):
    paths = {"ams": "[tex]/ams", "newcommand": "[tex]/newcommand"}
    config.mathjax_path = "mathjax/startup.js"
    config.mathjax3_config = {
        "loader": {"load": [paths.get(Path(part).name, part) for part in MATHJAX]},
        "tex": {"packages": ["base", "ams", "newcommand"]},
    }


def copy_mathjax(app):
    source = files("sphinx-mathjax-offline") / "static" / "mathjax"
    for part in [*ALSO, *MATHJAX]:
        target = Path(app.outdir) / "_static" / "mathjax" / f"{part}.js"
        target.parent.mkdir(parents=True, exist_ok=True)
        copyfile(source / f"{part}.js", target)


class Icons:
    """Font Awesome's pictures by name, taken from the script that the theme brings along."""

    def __init__(self, script):
        self.script, self.known = script, {}

    def path(self, name):
        """(width, height, path) of an icon, by its name or an older one; the solid one."""
        if name not in self.known:
            word = re.escape(name)
            shape = r'\[(\d+),(\d+),\[{0}\],"\w+","([^"]+)"\]'
            named = rf'[,{{]"?{word}"?:' + shape.format(r"[^\]]*")
            once = shape.format(rf'[^\]]*"{word}"[^\]]*')
            found = re.findall(named, self.script) or re.findall(once, self.script)
            if not found:
                raise ValueError(f"the theme has no icon {name!r}")
            self.known[name] = found[-1]
        return self.known[name]

    def svg(self, match):
        _, classes, rest = match.groups()
        name = re.findall(r"\bfa-(?!solid|brands|lg)([\w-]+)", classes)[0]
        width, height, path = self.path(name)
        return (
            f'<svg class="icon {classes}"{rest} viewBox="0 0 {width} {height}"'
            f' aria-hidden="true"><path fill="currentColor" d="{path}"/></svg>'
        )


def lighten(app, error):
    """Icons into the pages; what nobody loads out of the folder."""
    if error or app.builder.format != "html":
        return
    out = Path(app.outdir)
    awesome = out / "_static" / "vendor" / "fontawesome"
    (script,) = awesome.rglob("all.min.js")
    icons = Icons(script.read_text(encoding="utf-8"))
    for page in out.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        text = FONT_AWESOME.sub("", PRELOAD.sub("", text))
        page.write_text(ICON.sub(icons.svg, text), encoding="utf-8")
    rmtree(awesome)
    for file in [*out.rglob("*.map"), *out.glob("_static/*webpack-macros.html")]:
        file.unlink()


def setup(app):
    app.connect("config-inited", ask_for_mathjax, priority=100)  # before MyST adds to it
    app.connect("builder-inited", copy_mathjax)
    app.connect("build-finished", lighten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
