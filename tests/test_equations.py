"""Equations are cut where they can wrap, and nowhere else."""

import sys

import pytest
import sync
from docutils import nodes
from docutils.utils import new_document

sys.path.append(str(sync.ROOT / "book/_ext"))
import equations  # noqa: E402

SUM = "A = " + " + ".join(rf"\underbrace{{x_{n}^\top + (W_{n} = 1) y}}_{{(a)}}" for n in range(4))


@pytest.mark.parametrize(
    "tex, expected",
    [
        ("a = b", [["a = b"]]),
        (r"a = b , \qquad c = d", [["a = b ,"], ["c = d"]]),
        (r"\sin p , \quad \cos p", [[r"\sin p ,"], [r"\cos p"]]),
        ("a = b = c + d", [["a = b", "= c + d"]]),
        (r"a = \frac{b = c}{d} (e = f) \left[ g = h \right]", None),
        (r"\text{a \quad b} + c", None),
        ("x + y", None),
    ],
)
def test_where_an_equation_is_cut(tex, expected):
    found = [equations.pieces(part) for part in equations.parts(tex)]
    assert found == (expected or [[tex]])


def test_a_long_sum():
    (part,) = equations.parts(SUM)
    found = equations.pieces(part)
    assert len(found) == 4 and all(piece.startswith("{}+") for piece in found[1:])
    assert "".join(found).replace("{}", "").replace(" ", "") == SUM.replace(" ", "")


def rendered(*children):
    tree = new_document("page")
    tree += nodes.paragraph("", "", *children)
    equations.wrap(None, tree)
    return tree


def test_display():
    tree = rendered(nodes.math_block("", r"a = b , \qquad c = d = e"))
    assert [node.astext() for node in tree.findall(nodes.math)] == [
        r"\displaystyle a = b ,", r"\displaystyle c = d", r"\displaystyle = e"
    ]  # fmt: skip
    for tex in ("a = b", r"\begin{aligned} a &= b \\ c &= d = e \end{aligned}"):
        assert len(list(rendered(nodes.math_block("", tex)).findall(nodes.math_block))) == 1


def test_in_a_line_of_text():
    long = r"T + M + T \lceil M/T \rceil (L - 1) = 8 + 4 + 8 \cdot 1 = 20"
    found = [node.astext() for node in rendered(nodes.math("", long)).findall(nodes.math)]
    assert found == [r"T + M + T \lceil M/T \rceil (L - 1)", r"= 8 + 4 + 8 \cdot 1", "= 20"]
    short = rendered(nodes.math("", "a = b = c"))
    assert len(list(short.findall(nodes.math))) == 1
