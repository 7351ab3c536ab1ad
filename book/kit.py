"""One folder for a room without a network: `make kit` makes book/_build/kit.

It holds this repository as committed, the packages (wheels/), the text (data/), the
handouts, the book if it has been built, weights/ if there are any, and start.sh. Make
it with a network, on the same system, processor type and Python version as the
machines of the room.
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import handouts
import sync

from memtx_minimal import corpora

FOLDER = sync.ROOT / "book" / "_build" / "kit"
CPU = "https://download.pytorch.org/whl/cpu"
START = """#!/bin/sh
# sh start.sh: installs from this folder, without a network, and opens JupyterLab.
set -e
cd "$(dirname "$0")"
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$PWD/wheels" MEMTX_DATA_DIR="$PWD/data"
cd memtx-minimal
exec make "${@:-lab}"
"""


def copy_committed(to):
    """What is committed, and nothing else: no .venv, no outputs of a build."""
    command = ["git", "archive", "--format=tar", "HEAD"]
    done = subprocess.run(command, cwd=sync.ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout), encoding="utf-8") as archive:
        archive.extractall(to, **SAFE)


SAFE = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def fetch_packages(to):
    """The pinned packages as wheels; on Linux torch without its packages for GPUs."""
    requirements = sync.ROOT / "requirements.txt"
    pip = [sys.executable, "-m", "pip", "download", "--dest", to]
    if sys.platform == "linux":
        torch = re.search(r"(?m)^torch==[\w.]+", sync.read(requirements))[0]
        subprocess.run([*pip, "--no-deps", torch, "--index-url", CPU], check=True)
    subprocess.run([*pip, "-r", requirements, "--find-links", to], check=True)


def fetch_text(to):
    """The one megabyte that all chapters read, checked."""
    if folder := os.environ.get("MEMTX_DATA_DIR"):
        corpora.tiny_shakespeare()  # checks it
        shutil.copy(Path(folder).expanduser() / corpora.FILE_NAME, to)
        return
    os.environ["MEMTX_CACHE_DIR"] = str(to)
    if corpora.tiny_shakespeare().name != "Tiny Shakespeare":
        sys.exit("the text could not be downloaded: try again with a network")


def make(folder=FOLDER, packages=True):
    """The folder, made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("memtx-minimal", "wheels", "data"):
        (folder / name).mkdir(parents=True)
    copy_committed(folder / "memtx-minimal")
    fetch_text(folder / "data")
    handouts.write(folder / "handouts")
    for built, name in [("book/_build/html", "book"), ("weights", "weights")]:
        if (sync.ROOT / built).exists():
            shutil.copytree(sync.ROOT / built, folder / name)
    sync.write(folder / "start.sh", START)
    if packages:
        fetch_packages(folder / "wheels")


def main():
    args = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args.add_argument(
        "--without-packages", action="store_true", help="leave wheels/ empty"
    )
    make(packages=not args.parse_args().without_packages)
    if not (FOLDER / "book").exists():
        print("no book in it: run `make site` first to have it there")
    print(f"The kit is {FOLDER}: copy it to each machine, and there type: sh start.sh")


if __name__ == "__main__":
    main()
