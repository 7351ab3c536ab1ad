"""What the build changes in the pages that it is handed."""

import base64
import io
import re

import build
import nbformat
import pytest
import sync
from bs4 import BeautifulSoup
from PIL import Image

ALT = 'A line that rises, "slowly".'


def picture(kind):
    frames = [Image.new("P", (4, 4), color=n) for n in range(3)]
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": frames[1:]} if kind == "gif" else {}
    frames[0].save(buffer, format=kind, **more)
    data = {f"image/{kind}": base64.b64encode(buffer.getvalue()).decode()}
    return nbformat.v4.new_output(
        "display_data", data, metadata={f"image/{kind}": {"alt": ALT, "width": 640}}
    )


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "STAGE", tmp_path)
    (tmp_path / "book" / "_static").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("with_still", [True, False])
def test_an_animation_becomes_a_player(stage, with_still):
    gif, png = picture("gif"), picture("png")
    cell = nbformat.v4.new_code_cell(outputs=[gif, png] if with_still else [gif])
    build.dress(nbformat.v4.new_notebook(cells=[cell]))
    (out,) = cell.outputs
    figure = BeautifulSoup(out.data["text/html"], "html.parser").figure
    assert figure.img["alt"] == ALT and figure.img["width"] == "640"
    still = (stage / "book" / "notebooks" / figure.img["src"]).resolve().read_bytes()
    moving = (stage / "book" / "notebooks" / figure["data-animation"]).resolve().read_bytes()
    assert moving == base64.b64decode(gif.data["image/gif"])
    assert Image.open(io.BytesIO(still)).format == "PNG"
    if with_still:
        assert still == base64.b64decode(png.data["image/png"])


def test_a_cell_with_two_pictures_is_refused(stage):
    cell = nbformat.v4.new_code_cell(outputs=[picture("png"), picture("png")])
    with pytest.raises(SystemExit, match="shows 2 pictures"):
        build.dress(nbformat.v4.new_notebook(cells=[cell]))


def test_the_front_page_moves_to_the_root(tmp_path):
    (tmp_path / "book").mkdir()
    text = "[a](../notebooks/00.ipynb) [b](quiz.md) ![c](_static/c.png) [d](https://e.org) [f](#g)"
    (tmp_path / "book" / "intro.md").write_text(text, encoding="utf-8")
    build.front(tmp_path)
    assert (tmp_path / "index.md").read_text(encoding="utf-8").strip() == (
        "[a](notebooks/00.ipynb) [b](book/quiz.md) ![c](book/_static/c.png) [d](https://e.org) [f](#g)"
    )
    assert not (tmp_path / "book" / "intro.md").exists()


PAGES = [*sync.ROOT.glob("book/*.md"), *sync.ROOT.glob("notebooks/**/*.ipynb")]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_line_does_not_begin_a_list_by_chance_nor_a_power_bold_type(path):
    """As "16 + 16" does, if it is broken before the plus, and 2**15 with another such."""
    texts = [sync.read(path)]
    if path.suffix == ".ipynb":
        nb = nbformat.read(path, as_version=4)
        texts = [cell.source for cell in nb.cells if cell.cell_type == "markdown"]
    for text in texts:
        text = re.sub(r"(?ms)^(\s*)(```|~~~).*?^\1\2|\$\$.*?\$\$", "", text)
        for paragraph in re.split(r"\n\s*\n", text):
            first, *lines = paragraph.strip("\n").split("\n")
            begins_list = r"\s*([-+*]|1[.)])\s"
            if not re.match(begins_list + r"|\s*(\d+\.|[#<:(])|.*(:|\*\*)$", first):
                assert not [line for line in lines if re.match(begins_list, line)]
        assert not re.findall(r"\d\*\*\d.*", re.sub(r"`[^`\n]*`", "", text))
