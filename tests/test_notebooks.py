"""The committed notebooks are what a run from top to bottom leaves behind, on any machine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import sync

ROOT = Path(__file__).resolve().parent.parent
NAMES = sync.notebooks(ROOT) + sync.solutions(ROOT)
NOTEBOOKS = [ROOT / "notebooks" / f"{name}.ipynb" for name in NAMES]


@pytest.fixture(params=NOTEBOOKS, ids=sync.file_name)
def path(request):
    return request.param


@pytest.fixture
def nb(path):
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    return nb


def code_cells(nb):
    return [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]


def texts(nb):
    """Every text that the outputs hold, streams and tracebacks and all mime types but pictures."""
    for cell in code_cells(nb):
        for out in cell.outputs:
            yield out.get("text", "")
            yield from (str(v) for k, v in out.get("data", {}).items() if not k.startswith("image/") or "svg" in k)


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_executed_once_from_top_to_bottom(nb):
    assert [c.execution_count for c in code_cells(nb)] == list(range(1, len(code_cells(nb)) + 1))


def test_no_errors(nb):
    assert not [o.evalue for c in code_cells(nb) for o in c.outputs if o.output_type == "error"]


def test_nothing_of_the_machine(path, nb):
    text = sync.read(path) + sync.read(path.with_suffix(".py"))
    assert not re.findall(r"(?<![\w.])/(?:root|home|work|tmp|Users|var)/\S*", text)
    assert not re.findall(r" at 0x[0-9a-f]+", "".join(texts(nb)))


def test_nothing_of_the_hour(nb):
    stamps = [k for c in nb.cells for k in ("execution", "ExecuteTime", "execution_time") if k in c.metadata]
    assert not stamps and "widgets" not in nb.metadata


def test_no_residue_of_progress_bars(nb):
    assert not [t for t in texts(nb) if "\r" in t or "\x1b[" in t or re.search(r"\d+%\|", t)]


def test_outputs_load_nothing_from_elsewhere(nb):
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//\S+""", "".join(texts(nb)))


def test_every_picture_has_its_alt_text(nb):
    for i, cell in enumerate(nb.cells, 1):
        for out in cell.get("outputs", []):
            for kind in [k for k in out.get("data", {}) if k.startswith("image/")]:
                alt = out.metadata.get(kind, {}).get("alt", "")
                assert len(alt) > 20, f"cell {i}: {kind} without a description; display(Image(data, alt='what it shows'))"


def test_cells_are_short(nb):
    assert not [i for i, c in enumerate(nb.cells, 1) if len(c.source.splitlines()) > 45]


def test_code_is_at_most_88_columns_wide(nb):
    lines = [line for cell in nb.cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    assert not [line for line in lines if len(line) > 88]


MODEL_FILES = {  # the most lines
    "vanilla_transformer": 150, "transformer_xl": 150, "compressive_transformer": 230,
    "feedback_transformer": 220, "reformer": 300, "memory_today": 260,
}  # fmt: skip


@pytest.mark.parametrize("name, most", MODEL_FILES.items())
def test_a_model_file_can_be_held_in_the_head(name, most):
    lines = sync.read(ROOT / "memtx_minimal" / f"{name}.py").splitlines()
    assert len(lines) <= most and max(map(len, lines)) <= 88


def test_the_pair_as_jupytext_writes_it(path):
    """Once more by the command line, so that the check does not rest on our own code alone."""
    jupytext = [sys.executable, "-X", "utf8", "-m", "jupytext", "--to", "py:percent"]
    done = subprocess.run(
        [*jupytext, "--output", "-", path],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout == sync.read(path.with_suffix(".py"))


def test_chapter_0_shows_the_training_loop_as_it_is():
    """All but its docstring: the cell would be longer than a screen with it."""
    nb = nbformat.read(ROOT / "notebooks" / "00_attention.ipynb", as_version=4)
    ((_, cell),) = sync.tagged(nb, "as-in-training")
    source = sync.definitions(ROOT / "memtx_minimal" / "training.py")["train"]
    (shown,), (right,) = ast.parse(cell.source).body, ast.parse(source).body
    assert ast.get_docstring(right, clean=False)
    del right.body[0]
    assert ast.dump(shown) == ast.dump(right)
