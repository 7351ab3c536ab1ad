"""The page on scale says what torch.compile and torch.export make of each model: so it
is, cell by cell. Tried in compiled.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import compiled
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "book" / "scale.md").read_text(encoding="utf-8")
VERSION = re.search(r"PyTorch (\d+\.\d+)\.", PAGE)[1]  # that the table is about
SECONDS = 1500  # inductor's, on a busy machine

pytestmark = [
    pytest.mark.skipif(
        not torch.__version__.startswith(VERSION + "."),
        reason=f"the table is about PyTorch {VERSION}",
    ),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="each cell has its own process"),
]
no_compiler = not shutil.which(os.environ.get("CXX", "g++"))
slow = pytest.mark.skipif(
    no_compiler or "MEMTX_INDUCTOR" not in os.environ,
    reason="needs a C++ compiler, six minutes, and MEMTX_INDUCTOR=1 to ask for it",
)


def table():
    """The page's, {row: {head: cell}}."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    start = next(n for n, row in enumerate(rows) if "export" in row)
    head, _, *rows = rows[start : start + 2 + len(compiled.ROWS)]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


BACKENDS = "aot_eager", pytest.param("inductor", marks=slow)


@pytest.fixture(scope="module", params=BACKENDS)
def found(request, tmp_path_factory):
    """What works with a backend, {row: {head: None, or the fault}}. aot_eager does all
    that torch.compile does, but for writing C++."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # forks, later on, go badly with more
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, compiled.__file__, request.param], env=environment,
        capture_output=True, encoding="utf-8", timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5_000:]
    lines = map(json.loads, done.stdout.splitlines())
    return {line["row"]: line["faults"] for line in lines}


def test_the_table_has_all_rows():
    assert list(table()) == list(compiled.ROWS)
    assert all(list(cells) == list(compiled.CELLS) for cells in table().values())


@pytest.mark.parametrize("row", compiled.ROWS)
def test_the_table_is_true(row, found):
    for head, cell in table()[row].items():
        fault = found[row][head]
        assert (cell == "yes") == (fault is None), (head, cell, fault)
        assert cell == "yes" or re.fullmatch("no: .+", cell), cell
        for word in re.findall("`(.+?)`", cell):
            assert word in fault, (head, cell)
