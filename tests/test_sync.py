"""The copies in this repository are equal to their sources, and `book/sync.py` sees each way in which they could drift."""

import os

import nbformat
import pytest
import sync

URL = "https://github.com/someone/somewhere"
MODULE = '''"""A model of two pieces."""

import functools


@functools.cache
def shift(x):
    return x + 1  # (T,)


class Model:
    def forward(self, x):
        return shift(x)
'''


def test_this_repository_is_in_sync():
    assert sync.sync(check=True) == ([], [])


@pytest.fixture
def tree(tmp_path):
    """A repository in small, in sync."""
    cell = nbformat.v4.new_code_cell
    cells = [
        nbformat.v4.new_markdown_cell(metadata={"tags": ["badges"]}),
        cell(metadata={"tags": ["colab-install"]}),
        cell("def shift(x): ...", metadata={"tags": ["from-module"]}),
        cell("shift(1)", execution_count=1, outputs=[nbformat.v4.new_output("stream", text="2\n")]),
        cell("class Model: ...", metadata={"tags": ["from-module"]}),
    ]
    files = {
        "pyproject.toml": f'[project]\nname = "small"\n[project.urls]\nRepository = "{URL}"\n',
        "README.md": "<!-- sync: clone -->\n<!-- end -->\n[Colab][colab 01]\n<!-- sync: links -->\n<!-- end -->\n",
        "CITATION.cff": "title: small\nrepository-code: none\n",
        "book/_config.yml": "repository:\n  url: none\n  branch: main\n",
        "memtx_minimal/tiny.py": MODULE,
        "notebooks/01_tiny.ipynb": nbformat.writes(nbformat.v4.new_notebook(cells=cells)),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    sync.sync(tmp_path)
    assert sync.sync(tmp_path, check=True) == ([], [])
    return tmp_path


def edit(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def edit_cells(tree, change):
    """Change the notebook's cells and write both files of the pair."""
    nb = nbformat.read(tree / "notebooks/01_tiny.ipynb", as_version=4)
    nb.cells = change(nb.cells)
    (tree / "notebooks/01_tiny.ipynb").write_text(nbformat.writes(nb))
    (tree / "notebooks/01_tiny.py").write_text(sync.percent(nb))


def test_mirrored_cell_holds_the_decorator_and_the_comment(tree):
    nb = nbformat.read(tree / "notebooks/01_tiny.ipynb", as_version=4)
    assert nb.cells[2].source == "@functools.cache\ndef shift(x):\n    return x + 1  # (T,)"


def test_one_changed_character_in_the_module(tree):
    edit(tree / "memtx_minimal/tiny.py", "x + 1", "x + 2")
    drift, broken = sync.sync(tree, check=True)
    assert len(drift) == 1 and "cell 3: shift differs from tiny.py (line 3" in drift[0] and not broken
    sync.sync(tree)
    assert sync.sync(tree, check=True) == ([], [])
    assert "x + 2" in (tree / "notebooks/01_tiny.py").read_text()


def test_one_changed_character_in_the_cell(tree):
    for suffix in ("py", "ipynb"):
        edit(tree / f"notebooks/01_tiny.{suffix}", "x + 1", "x + 2")
    drift, _ = sync.sync(tree, check=True)
    assert len(drift) == 1 and "cell 3: shift differs from tiny.py" in drift[0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda cells: cells[:4], "no cell for Model of tiny.py"),
        (lambda cells: [*cells, nbformat.from_dict({**cells[2], "id": "again"})], "shift stands in 2 cells"),
        (lambda cells: [*cells[:2], cells[4], *cells[2:4]], "its cells go Model, shift; tiny.py goes shift, Model"),
        (lambda cells: cells[1:], "0 cells tagged badges instead of one"),
    ],
    ids=["missing", "repeated", "out of order", "no badges"],
)
def test_cells_that_an_author_must_mend(tree, change, message):
    edit_cells(tree, change)
    drift, broken = sync.sync(tree, check=True)
    assert not drift and len(broken) == 1 and message in broken[0]


@pytest.mark.parametrize("source, message", [("x = 1", "0 definitions"), ("def other(): ...", "defines no other")])
def test_a_tagged_cell_without_its_definition(tree, source, message):
    edit_cells(tree, lambda cells: [*cells, nbformat.v4.new_code_cell(source, metadata={"tags": ["from-module"]})])
    assert message in sync.sync(tree, check=True)[1][0]


def test_constants_of_the_module_stand_in_some_cell(tree):
    module = tree / "memtx_minimal/tiny.py"
    module.write_text(module.read_text() + "\n\nA, B = 1, 2  # what they are\n")
    assert sync.sync(tree, check=True)[1] == ["01_tiny: no cell has the lines 'A, B = 1, 2  # what they are' of tiny.py"]
    edit_cells(tree, lambda cells: [*cells, nbformat.v4.new_code_cell("A, B = 1, 2  # what they are\nprint(A)")])
    sync.sync(tree)
    assert sync.sync(tree, check=True) == ([], [])


def test_a_second_file_of_the_chapter(tree, monkeypatch):
    """Its definitions have cells too, in the order of their own file, wherever these stand among the others."""
    monkeypatch.setitem(sync.MODULES, "tiny", ["tiny", "quick"])
    (tree / "memtx_minimal/quick.py").write_text("def fast():\n    return 1\n\n\ndef faster():\n    return 2\n")
    faults = sync.sync(tree, check=True)[1]
    assert faults == [f"01_tiny: no cell for {name} of quick.py" for name in ("fast", "faster")]
    stubs = [nbformat.v4.new_code_cell(f"def {name}(): ...", metadata={"tags": ["from-module"]}) for name in ("fast", "faster")]
    edit_cells(tree, lambda cells: [*cells[:2], stubs[0], *cells[2:], stubs[1]])
    drift, broken = sync.sync(tree, check=True)
    assert len(drift) == 2 and "fast differs from quick.py" in drift[0] and not broken
    sync.sync(tree)
    assert sync.sync(tree, check=True) == ([], [])
    edit_cells(tree, lambda cells: [*cells[:2], cells[-1], *cells[3:-1], cells[2]])
    assert "its cells go faster, fast; quick.py goes fast, faster" in sync.sync(tree, check=True)[1][0]


@pytest.mark.parametrize("newer, older", [("py", "ipynb"), ("ipynb", "py")])
def test_the_newer_file_of_a_pair_wins(tree, newer, older):
    before = nbformat.read(tree / "notebooks/01_tiny.ipynb", as_version=4)
    edit(tree / f"notebooks/01_tiny.{newer}", "shift(1)", "shift(1)  # two")
    os.utime(tree / f"notebooks/01_tiny.{older}", (0, 0))
    drift, _ = sync.sync(tree, check=True)
    assert len(drift) == 1 and f"01_tiny.{older} differs from 01_tiny.{newer}, which is newer and wins" in drift[0]
    sync.sync(tree)
    after = nbformat.read(tree / "notebooks/01_tiny.ipynb", as_version=4)
    assert after.cells[3].source == "shift(1)  # two" and "# two" in (tree / "notebooks/01_tiny.py").read_text()
    assert [c.id for c in after.cells] == [c.id for c in before.cells]
    assert after.cells[3].outputs == before.cells[3].outputs
    assert "jupytext" not in after.metadata  # the pair stands in pyproject.toml


@pytest.mark.parametrize("gone", ["py", "ipynb"])
def test_a_missing_half_is_written(tree, gone):
    (tree / f"notebooks/01_tiny.{gone}").unlink()
    assert f"01_tiny.{gone} is missing" in sync.sync(tree, check=True)[0][0]
    sync.sync(tree)
    assert sync.sync(tree, check=True) == ([], [])


def test_a_new_address_reaches_every_copy(tree):
    edit(tree / "pyproject.toml", "someone", "someone-else")
    drift, broken = sync.sync(tree, check=True)
    assert len(drift) == 5 and not broken
    sync.sync(tree)
    left = [p.name for p in tree.rglob("*") if p.is_file() and "someone/" in p.read_text()]
    assert not left and sync.sync(tree, check=True) == ([], [])


def test_a_drifted_badge(tree):
    for suffix in ("py", "ipynb"):
        edit(tree / f"notebooks/01_tiny.{suffix}", "github/someone", "github/nobody")
    drift, _ = sync.sync(tree, check=True)
    assert len(drift) == 1 and "the badges cell does not follow project.urls" in drift[0]


def test_a_readme_without_its_markers(tree):
    edit(tree / "README.md", "sync: links", "links")
    assert "0 blocks from '<!-- sync: links -->'" in sync.sync(tree, check=True)[1][0]


def test_the_readme_shows_what_the_notebook_shows(tree):
    picture = nbformat.v4.new_output("display_data", data={"image/png": "iVBORw=="})
    figure = nbformat.v4.new_code_cell("draw()", metadata={"tags": ["readme-figure"]}, outputs=[picture])
    edit_cells(tree, lambda cells: [*cells, figure])
    (tree / "book/_static").mkdir()
    assert sync.sync(tree, check=True)[0] == ["readme.png is not the figure that 01_tiny shows"]
    sync.sync(tree)
    assert (tree / "book/_static/readme.png").read_bytes() == b"\x89PNG"
    assert sync.sync(tree, check=True) == ([], [])
