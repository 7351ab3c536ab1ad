r"""Sphinx extension: equations that wrap where the page is narrow.

MathJax breaks no lines. So a displayed equation is set in pieces: two formulas on a line
(`\qquad` between them), a second "=", the terms of a long sum. They stand side by side
where there is room, and under each other where there is none. Long equations in a line
of text can break before a "=" too.
"""

import re

from docutils import nodes

LONG = 40  # characters of TeX: an equation in the text that may be wider than a telephone
LONG_SUM = 100
TOKEN = re.compile(r"\\(?:left|right|begin|end|q?quad)(?![a-zA-Z])|\\[a-zA-Z]+|\\.|.", re.S)


def top_level(tex):
    """(position, token) of what stands in no braces, parentheses or environment."""
    depth = 0
    for match in TOKEN.finditer(tex):
        token = match[0]
        depth += token in ("{", "(", "[", r"\left", r"\begin")
        depth -= token in ("}", ")", "]", r"\right", r"\end")
        if depth == 0:
            yield match.start(), token


def cut(tex, places):
    """The pieces of tex between positions."""
    ends = [0, *places, len(tex)]
    return [tex[a:b].strip() for a, b in zip(ends, ends[1:])]


def parts(tex):
    """Formulas that stand side by side."""
    found = [(at, token) for at, token in top_level(tex) if token in (r"\quad", r"\qquad")]
    pieces = cut(tex, [at for at, _ in found])
    return [piece.removeprefix(r"\qquad").removeprefix(r"\quad").strip() for piece in pieces]


def pieces(tex, first=1):
    """One formula, cut before every "=" but the first, and before the terms of a long sum."""
    equals = [at for at, token in top_level(tex) if token == "="]
    found = []
    for piece in cut(tex, equals[first:]):
        pluses = [at for at, token in top_level(piece) if token == "+"]
        found += cut(piece, pluses) if len(piece) > LONG_SUM else [piece]
    return ["{}" + p if p.startswith("+") else p for p in found if p]


def wrap_display(node):
    tex = node.astext()
    if r"\begin" in tex or node.get("label"):
        return
    split = [pieces(part) for part in parts(tex)]
    if split == [[tex.strip()]]:
        return
    box = nodes.container(classes=["math", "equation"])
    for part in split:
        formula = nodes.container(classes=["formula"])
        for piece in part:
            formula += nodes.math("", rf"\displaystyle {piece}")
        box += formula
    node.replace_self(box)


def wrap_inline(node):
    tex = node.astext()
    if len(tex) < LONG or len(split := pieces(tex, first=0)) == 1:
        return
    new = []
    for piece in split:
        new += [nodes.math("", piece), nodes.Text(" ")]
    node.parent.replace(node, new[:-1])


def wrap(app, tree):
    for node in list(tree.findall(nodes.math_block)):
        wrap_display(node)
    for node in list(tree.findall(nodes.math)):
        if not isinstance(node.parent, nodes.container):
            wrap_inline(node)


def setup(app):
    app.connect("doctree-read", wrap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
