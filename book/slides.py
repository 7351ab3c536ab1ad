"""Every figure of the book as SVG and PNG: `make figures` puts them in book/_build/figures.

The notebooks are run once, trainings included, as in `make book`; NAME=01 takes one of
them. Each file holds its alt text, its chapter and the licence; figures.csv lists them.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

import execute
import nbformat
import sync

from memtx_minimal import figures

FOLDER = sync.ROOT / "book" / "_build" / "figures"
LICENCE = "CC BY 4.0, https://creativecommons.org/licenses/by/4.0/"
COLUMNS = ["file", "chapter", "alt", "licence"]
KEEP = """import sys

sys.path.append({book!r})
import slides

slides.keep({folder!r}, {name!r}, {title!r})"""


def save(figure, folder, name, title, alt):
    """One figure as name.svg and name.png, and its line for the list."""
    about = {"Title": title, "Description": alt}
    svg = about | {"Rights": LICENCE, "Date": None, "Creator": "memtx-minimal"}
    png = about | {"Copyright": LICENCE, "Author": "memtx-minimal", "Software": None}
    figure.savefig(folder / f"{name}.svg", metadata=svg)
    figure.savefig(folder / f"{name}.png", metadata=png, dpi=200)
    with (folder / "figures.csv").open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow([name, title, alt, LICENCE])


def keep(folder, name, title):
    """From here on, whatever a notebook shows is also saved: of an animation each frame.
    Called in the notebook's own process."""
    folder, shown = Path(folder), 0
    show, show_animation = figures.show, figures.show_animation

    def number():
        nonlocal shown
        shown += 1
        return f"{sync.split_name(name)[0]}_figure_{shown:02}"

    def show_and_save(figure, alt):
        save(figure, folder, number(), title, alt)
        show(figure, alt)

    def show_and_save_frames(frames, alt, seconds=1.2):
        first = number()
        for n, frame in enumerate(frames, 1):
            words = f"Frame {n} of {len(frames)}. {alt}"
            save(frame, folder, f"{first}_frame_{n:02}", title, words)
        show_animation(frames, alt, seconds)

    figures.show, figures.show_animation = show_and_save, show_and_save_frames


def export(path, folder=FOLDER):
    """Run one notebook, and save its figures in a folder that is there."""
    nb = nbformat.read(path, as_version=4)
    title = re.search(r"(?m)^# (.+)$", nb.cells[0].source)[1]
    book = str(Path(__file__).parent)
    first = KEEP.format(book=book, folder=str(folder), name=path.stem, title=title)
    nb.cells.insert(0, nbformat.v4.new_code_cell(first))
    execute.execute(nb, path.parent, path.stem)


def main():
    args = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args.add_argument(
        "name", nargs="?", default="", help="01, or a: this chapter alone"
    )
    options, names = args.parse_args(), sync.notebooks()
    names = [name for name in names if name.startswith(options.name)]
    if not names:
        args.error(
            f"no notebook {options.name}: choose from {', '.join(sync.notebooks())}"
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in FOLDER.glob("*.*"):
        old.unlink()
    with (FOLDER / "figures.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerow(COLUMNS)
    for name in names:
        export(sync.ROOT / "notebooks" / f"{name}.ipynb")
    n = len(list(FOLDER.glob("*.svg")))
    print(f"{n} figures, as SVG and PNG, are in {FOLDER}; figures.csv describes them")


if __name__ == "__main__":
    sys.exit(main())
