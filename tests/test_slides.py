"""Figures for slides: each as SVG and PNG, with its words, its chapter and the licence."""

import csv

import matplotlib

matplotlib.use("Agg")
import nbformat
import pytest
import slides
from PIL import Image

CODE = """from memtx_minimal import figures
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(2, 2))
axes.plot([1, 2])
figures.show(figure, "It rises, from left to right.")
figures.show_animation([plt.figure(figsize=(2, 2)) for n in range(2)], "Nothing moves.")"""


def test_a_notebook_leaves_its_figures_and_their_words(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("# 7. Tiny"), nbformat.v4.new_code_cell(CODE)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "07_tiny.ipynb")
    (tmp_path / "out").mkdir()
    slides.export(tmp_path / "07_tiny.ipynb", tmp_path / "out")
    names = ["07_figure_01", "07_figure_02_frame_01", "07_figure_02_frame_02"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["figures.csv", *(f"{n}.{kind}" for n in names for kind in ("svg", "png"))]
    )
    with (tmp_path / "out" / "figures.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == names
    assert rows[0][1:] == ["7. Tiny", "It rises, from left to right.", slides.LICENCE]
    assert rows[2][2] == "Frame 2 of 2. Nothing moves."
    svg = (tmp_path / "out" / f"{names[0]}.svg").read_text("utf-8")
    for words in ("7. Tiny", "It rises, from left to right.", slides.LICENCE):
        assert words in svg
    with Image.open(tmp_path / "out" / f"{names[0]}.png") as picture:
        about = picture.info
    assert (about["Title"], about["Copyright"]) == ("7. Tiny", slides.LICENCE)
    assert about["Description"] == "It rises, from left to right."


def test_an_unknown_chapter_names_the_others(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["slides.py", "99"])
    with pytest.raises(SystemExit):
        slides.main()
    assert "no notebook 99: choose from 00_attention, 01_" in capsys.readouterr().err
