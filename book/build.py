"""Render the book into book/_build/html.

From the committed outputs (`make site`), or from a live run (`make book`).
"""

import argparse
import base64
import hashlib
import html
import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import execute
import nbformat
import sync
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "book" / "_build"
STAGE = BUILD / "source"  # what is rendered: a copy, so that neither a run nor the build touches what is committed


def stage():
    """Copy the pages; returns the notebooks' paths in the copy, in the order of the chapters."""
    for folder in (STAGE, BUILD / "html", BUILD / ".doctrees"):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "book", STAGE / "book", ignore=shutil.ignore_patterns("_build", "__pycache__"))
    shutil.copytree(ROOT / "notebooks", STAGE / "notebooks", ignore=shutil.ignore_patterns(".*", "*.py"))
    shutil.copytree(ROOT / "memtx_minimal", STAGE / "memtx_minimal", ignore=lambda _, names: [n for n in names if not n.endswith(".py")])
    front(STAGE)
    return [STAGE / "notebooks" / f"{name}.ipynb" for name in sync.notebooks(STAGE) + sync.solutions(STAGE)]


def front(stage):
    """book/intro.md becomes index.md, since the address of the book is that of its front page."""
    intro = stage / "book" / "intro.md"
    text = sync.read(intro)
    text = re.sub(r"\]\((?!\.\./|https?:|#)", "](book/", text).replace("](../", "](")
    sync.write(stage / "index.md", text)
    intro.unlink()


def player(gif, still):
    """An output that shows the still picture of an animation; book.js adds the button that
    sets it in motion. Both lie in _static, since a page copies pictures that it shows alone.
    """
    folder = STAGE / "book" / "_static" / "animations"
    folder.mkdir(exist_ok=True)
    data = base64.b64decode(gif.data["image/gif"])
    name = hashlib.sha256(data).hexdigest()[:16]
    (folder / f"{name}.gif").write_bytes(data)
    if still:
        (folder / f"{name}.png").write_bytes(base64.b64decode(still.data["image/png"]))
    else:  # an output from before there were stills: its last frame
        with Image.open(io.BytesIO(data)) as frames:
            frames.seek(frames.n_frames - 1)
            frames.save(folder / f"{name}.png")
    path = f"../_static/animations/{name}"
    about = {key: html.escape(str(v)) for key, v in gif.metadata["image/gif"].items()}
    return nbformat.v4.new_output(
        "display_data",
        {
            "text/html": f'<figure class="player" data-animation="{path}.gif"><img'
            f' src="{path}.png" alt="{about["alt"]}" width="{about["width"]}"></figure>'
        },
    )


def animate(cell):
    """Put players in the place of the animations and of the stills that follow them."""
    outputs = cell.get("outputs", [])
    for i, out in enumerate(outputs):
        if "image/gif" in out.get("data", {}):
            after = outputs[i + 1] if i + 1 < len(outputs) else {}
            still = after if "image/png" in after.get("data", {}) else None
            outputs[i : i + 1 + bool(still)] = [player(out, still)]


def dress(nb):
    """What the page needs and a notebook does not: alt text and width of each picture,
    players, and no cell for Colab."""
    for number, cell in enumerate(nb.cells, 1):
        animate(cell)
        outputs = [out for out in cell.get("outputs", []) if "data" in out]
        pictures = [out.metadata.get(kind, {}) for out in outputs for kind in out.data if kind.startswith("image/")]
        if len(pictures) > 1:
            sys.exit(f"cell {number} shows {len(pictures)} pictures; the page has one alt text for a cell: split it")
        for picture in pictures:
            cell.metadata.mystnb = {"image": {key: str(picture[key]) for key in ("alt", "width") if key in picture}}
        if "colab-install" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("remove-cell")


def render(strict):
    """Jupyter Book over the copy; strict makes every warning an error."""
    book = STAGE / "book"
    command = [Path(sys.executable).with_name("jupyter-book"), "build", STAGE, "--path-output", BUILD.parent]
    command += ["--config", book / "_config.yml", "--toc", book / "_toc.yml", "--quiet"]
    command += ["-W", "-n", "--keep-going"] * strict
    utf8 = os.environ | {"PYTHONUTF8": "1"}  # for Jupyter Book and its extensions
    print("rendering ...", flush=True)
    # Warnings go to stderr and are shown; stdout would only say where the pages are.
    done = subprocess.run(
        command, cwd=STAGE, env=utf8, stdout=subprocess.DEVNULL, check=False
    )
    return done.returncode


def main():
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--live", action="store_true", help="run every notebook first, training included")
    args.add_argument("--strict", action="store_true", help="make every warning an error")
    args = args.parse_args()
    sync.escape_unprintable()
    start, notebooks = time.monotonic(), stage()
    for i, path in enumerate(notebooks, 1):
        nb = nbformat.read(path, as_version=4)
        if args.live:
            execute.execute(nb, path.parent, f"notebook {i} of {len(notebooks)}  {path.stem}")
        dress(nb)
        sync.write(path, nbformat.writes(nb) + "\n")
    if failed := render(args.strict):
        sys.exit(failed)
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    print(f"The book is in {BUILD / 'html' / 'index.html'} ({minutes} min {seconds} s)")


if __name__ == "__main__":
    main()
