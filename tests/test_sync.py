"""The copies in this repository are equal to their sources.

`book/sync.py` sees each way in which they could drift, and loses no edit."""

import os
import shutil
import subprocess
import sys

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
        "README.md": "[Colab][colab 01]\n" + "".join(
            f"<!-- sync: {block} -->\n<!-- end -->\n" for block in ("badges", "clone", "links")
        ),
        "CITATION.cff": "title: small\nrepository-code: none\nversion: 0\n",
        "book/_config.yml": "repository:\n  url: none\n  branch: main\n",
        "memtx_minimal/__init__.py": '"""Small."""\n\n__version__ = "1.2.0"\n',
        "memtx_minimal/tiny.py": MODULE,
        "notebooks/01_tiny.ipynb": nbformat.writes(nbformat.v4.new_notebook(cells=cells)),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        sync.write(tmp_path / name, text)
    sync.sync(tmp_path)
    assert sync.sync(tmp_path, check=True) == ([], [])
    return tmp_path


def edit(path, old, new):
    assert old in sync.read(path)
    sync.write(path, sync.read(path).replace(old, new))


def edit_cells(tree, change):
    """Change the notebook's cells and write both files of the pair."""
    nb = nbformat.read(tree / "notebooks/01_tiny.ipynb", as_version=4)
    nb.cells = change(nb.cells)
    sync.write(tree / "notebooks/01_tiny.ipynb", nbformat.writes(nb))
    sync.write(tree / "notebooks/01_tiny.py", sync.percent(nb))


def test_mirrored_cell_holds_the_decorator_and_the_comment(tree):
    nb = nbformat.read(tree / "notebooks/01_tiny.ipynb", as_version=4)
    assert nb.cells[2].source == "@functools.cache\ndef shift(x):\n    return x + 1  # (T,)"


def test_one_changed_character_in_the_module(tree):
    edit(tree / "memtx_minimal/tiny.py", "x + 1", "x + 2")
    drift, broken = sync.sync(tree, check=True)
    assert len(drift) == 1 and "cell 3: shift differs from tiny.py (line 3" in drift[0] and not broken
    sync.sync(tree)
    assert sync.sync(tree, check=True) == ([], [])
    assert "x + 2" in sync.read(tree / "notebooks/01_tiny.py")


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
    sync.write(module, sync.read(module) + "\n\nA, B = 1, 2  # what they are\n")
    assert sync.sync(tree, check=True)[1] == ["01_tiny: no cell has the lines 'A, B = 1, 2  # what they are' of tiny.py"]
    edit_cells(tree, lambda cells: [*cells, nbformat.v4.new_code_cell("A, B = 1, 2  # what they are\nprint(A)")])
    sync.sync(tree)
    assert sync.sync(tree, check=True) == ([], [])


def test_a_second_file_of_the_chapter(tree, monkeypatch):
    """Its definitions have cells too, in the order of their own file, wherever these stand among the others."""
    monkeypatch.setitem(sync.MODULES, "tiny", ["tiny", "quick"])
    code = "def fast():\n    return 1\n\n\ndef faster():\n    return 2\n"
    sync.write(tree / "memtx_minimal/quick.py", code)
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


def read_cells(tree):
    return nbformat.read(tree / "notebooks/01_tiny.ipynb", as_version=4).cells


def contents(tree):
    files = [path for path in tree.rglob("*") if ".git" not in path.parts]
    return {path: path.read_bytes() for path in files if path.is_file()}


def edit_half(tree, half, new):
    """Write `new` in place of a call in one file of the pair."""
    edit(tree / f"notebooks/01_tiny.{half}", "shift(1)", new)


def make_older(tree, half):
    os.utime(tree / f"notebooks/01_tiny.{half}", (0, 0))


def git(tree, *command):
    names = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    nothing = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | nothing
    subprocess.run(
        ["git", *names, *command], cwd=tree, env=env, capture_output=True, check=True
    )


def commit(tree):
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--no-verify", "--message", "All")


@pytest.fixture
def clone(tree, tmp_path_factory):
    """A fresh clone of the tree: never synced, and all its files of the same age."""
    if not shutil.which("git"):
        pytest.skip("needs git")
    sync.write(tree / ".gitignore", "notebooks/.agreed/\n")
    git(tree, "init", "--quiet")
    commit(tree)
    clone = tmp_path_factory.mktemp("clone")
    git(tree, "clone", "--quiet", tree, clone)
    for path in (clone / "notebooks").iterdir():
        os.utime(path, (0, 0))
    assert sync.sync(clone, check=True) == ([], [])
    return clone


def assert_refused(tree):
    """Sync names both files and where they differ, and changes nothing."""
    before = contents(tree)
    drift, broken = sync.sync(tree)
    assert not drift and len(broken) == 1
    assert "01_tiny.py and 01_tiny.ipynb differ (line " in broken[0]
    assert "shift(1)" in broken[0]
    assert contents(tree) == before


both_halves = pytest.mark.parametrize("half, other", [("py", "ipynb"), ("ipynb", "py")])


@both_halves
@pytest.mark.parametrize("older", ["py", "ipynb"])
def test_the_edited_file_of_a_pair_wins_whatever_its_age(tree, half, other, older):
    before = read_cells(tree)
    edit_half(tree, half, "shift(1)  # two")
    make_older(tree, older)
    drift, _ = sync.sync(tree, check=True)
    assert len(drift) == 1
    assert f"01_tiny.{other} takes over the edit of 01_tiny.{half} (line " in drift[0]
    sync.sync(tree)
    after = read_cells(tree)
    assert after[3].source == "shift(1)  # two"
    assert "# two" in sync.read(tree / "notebooks/01_tiny.py")
    assert [c.id for c in after] == [c.id for c in before]
    assert after[3].outputs == before[3].outputs
    # The pair stands in pyproject.toml.
    assert '"jupytext"' not in sync.read(tree / "notebooks/01_tiny.ipynb")
    assert sync.sync(tree, check=True) == ([], [])


def test_two_edits_are_refused(tree):
    edit_half(tree, "py", "shift(1)  # two")
    edit_half(tree, "ipynb", "shift(1)  # three")
    assert_refused(tree)


def test_the_command_fails_on_two_edits(tree, monkeypatch, capsys):
    edit_half(tree, "py", "shift(1)  # two")
    edit_half(tree, "ipynb", "shift(1)  # three")
    monkeypatch.setattr(sync, "ROOT", tree)
    monkeypatch.setattr(sys, "argv", ["sync.py"])
    with pytest.raises(SystemExit) as stop:
        sync.main()
    assert stop.value.code == 1
    assert "make sync TAKE=01_tiny.py" in capsys.readouterr().out


def test_one_edit_in_both_files_is_none(tree):
    """As when JupyterLab saves a pair; the next edit starts from there."""
    for half in ("py", "ipynb"):
        edit_half(tree, half, "shift(1)  # two")
    assert sync.sync(tree) == ([], [])
    edit_half(tree, "ipynb", "shift(1)  # three")
    sync.sync(tree)
    assert "# three" in sync.read(tree / "notebooks/01_tiny.py")


def test_another_form_of_the_same_text_is_no_edit(tree):
    """A .py that another jupytext wrote, beside a notebook that was edited."""
    py = tree / "notebooks/01_tiny.py"
    edit(py, "jupytext_version: ", "jupytext_version: 0.")
    edit_half(tree, "ipynb", "shift(1)  # two")
    sync.sync(tree)
    assert "# two" in sync.read(py) and "jupytext_version: 0." not in sync.read(py)
    edit(py, "jupytext_version: ", "jupytext_version: 0.")
    assert sync.sync(tree) == (["01_tiny.py is not as jupytext writes it"], [])
    assert sync.sync(tree, check=True) == ([], [])


@both_halves
def test_without_a_state_to_compare_with_an_author_chooses(tree, half, other):
    shutil.rmtree(tree / "notebooks/.agreed")
    edit_half(tree, half, "shift(1)  # two")
    assert_refused(tree)
    sync.sync(tree, take=[f"01_tiny.{half}"])
    assert read_cells(tree)[3].source == "shift(1)  # two"
    edit_half(tree, half, "shift(1)  # of no use")
    sync.sync(tree, take=[f"01_tiny.{other}"])
    assert read_cells(tree)[3].source == "shift(1)  # two"
    assert sync.sync(tree, check=True) == ([], [])


def test_solutions_are_pairs_of_their_own(tree):
    py = tree / "notebooks/solutions/01_tiny.py"
    py.parent.mkdir()
    text = '# %% [markdown] tags=["badges"]\n\n# %% tags=["colab-install"]\n\n# %%\n1 + 1\n'
    sync.write(py, text)
    sync.sync(tree)
    ipynb = py.with_suffix(".ipynb")
    assert "somewhere/blob/v1.2.0/notebooks/solutions/01_tiny.ipynb" in sync.read(ipynb)
    assert sync.sync(tree, check=True) == ([], [])
    assert sync.notebooks(tree) == ["01_tiny"]
    assert sync.solutions(tree) == ["solutions/01_tiny"]
    edit(py, "1 + 1", "2 + 2")
    drift, _ = sync.sync(tree)
    assert "solutions/01_tiny.ipynb takes over the edit of solutions/01_tiny.py" in drift[0]
    edit(py, "2 + 2", "3 + 3")
    edit(ipynb, "2 + 2", "4 + 4")
    _, broken = sync.sync(tree)
    assert broken[0].endswith("make sync TAKE=solutions/01_tiny.py or make sync TAKE=solutions/01_tiny.ipynb")
    sync.sync(tree, take=["solutions/01_tiny.py"])
    assert "3 + 3" in sync.read(ipynb)


def test_a_file_to_take_must_be_there(tree, monkeypatch, capsys):
    monkeypatch.setattr(sync, "ROOT", tree)
    monkeypatch.setattr(sys, "argv", ["sync.py", "--take", "01_tny.py"])
    with pytest.raises(SystemExit):
        sync.main()
    assert "choose from 01_tiny.py, 01_tiny.ipynb" in capsys.readouterr().err


@both_halves
def test_an_edit_in_a_fresh_clone(clone, half, other, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(clone / "elsewhere"))
    edit_half(clone, half, "shift(1)  # two")
    make_older(clone, half)
    assert f"takes over the edit of 01_tiny.{half}" in sync.sync(clone)[0][0]
    edit_half(clone, half, "shift(1)  # three")  # not committed in between
    make_older(clone, half)
    assert f"takes over the edit of 01_tiny.{half}" in sync.sync(clone)[0][0]
    assert read_cells(clone)[3].source == "shift(1)  # three  # two"
    assert sync.sync(clone, check=True) == ([], [])


def test_two_edits_in_a_fresh_clone_are_refused(clone):
    edit_half(clone, "py", "shift(1)  # two")
    edit_half(clone, "ipynb", "shift(1)  # three")
    assert_refused(clone)


@both_halves
def test_an_edit_after_a_pull(clone, half, other):
    """The last commit counts where the last sync is of an older state."""
    sync.sync(clone)
    for suffix in ("py", "ipynb"):
        edit_half(clone, suffix, "shift(1)  # of another author")
    commit(clone)
    edit_half(clone, half, "shift(1)  # two")
    sync.sync(clone)
    assert "# two" in read_cells(clone)[3].source
    assert sync.sync(clone, check=True) == ([], [])


def test_half_a_pair_in_a_commit_is_no_state_to_compare_with(clone):
    """A .py edited on the web: it is as committed, and yet not to be overwritten."""
    edit_half(clone, "py", "shift(1)  # two")
    commit(clone)
    assert_refused(clone)


@both_halves
def test_a_file_taken_back_to_the_commit_is_refused(clone, half, other):
    """It was undone on purpose, or the other one was edited: nobody can tell."""
    edit_half(clone, "py", "shift(1)  # two")
    sync.sync(clone)
    git(clone, "checkout", "--", f"notebooks/01_tiny.{half}")
    assert_refused(clone)


@pytest.mark.parametrize("gone", ["py", "ipynb"])
def test_a_missing_half_is_written(tree, gone):
    (tree / f"notebooks/01_tiny.{gone}").unlink()
    assert f"01_tiny.{gone} is missing" in sync.sync(tree, check=True)[0][0]
    sync.sync(tree)
    assert sync.sync(tree, check=True) == ([], [])


def test_which_files_are_notebooks(tmp_path):
    names = "b_fast 00_attention 10_last a_by_hand c_draft 1_one notes 02"
    (tmp_path / "notebooks/solutions").mkdir(parents=True)
    for name in names.split():
        (tmp_path / f"notebooks/{name}.py").touch()
    for name in ("00_attention.ipynb", "03_web.ipynb", "04_data.txt", ".05_x.py.part"):
        (tmp_path / "notebooks" / name).touch()
    found = ["00_attention", "03_web", "10_last", "a_by_hand", "b_fast"]
    assert sync.notebooks(tmp_path) == found


def test_an_appendix_has_its_module_and_its_links(tree):
    for half in ("py", "ipynb"):
        path = tree / f"notebooks/01_tiny.{half}"
        path.rename(path.with_stem("a_tiny"))
    sync.sync(tree)
    assert sync.sync(tree, check=True) == ([], [])
    readme = sync.read(tree / "README.md")
    assert "[notebook a]: notebooks/a_tiny.ipynb\n[colab a]: https://colab" in readme


def test_a_notebook_without_its_module(tree):
    (tree / "memtx_minimal/tiny.py").rename(tree / "memtx_minimal/tinier.py")
    assert sync.sync(tree, check=True)[1] == [
        "01_tiny: no memtx_minimal/tiny.py; mend sync.MODULES or add it"
    ]


def test_a_new_address_reaches_every_copy(tree):
    edit(tree / "pyproject.toml", "someone", "someone-else")
    drift, broken = sync.sync(tree, check=True)
    assert len(drift) == 5 and not broken
    sync.sync(tree)
    files = [path for path in tree.rglob("*") if path.is_file()]
    assert not [path.name for path in files if "someone/" in sync.read(path)]
    assert sync.sync(tree, check=True) == ([], [])


def test_a_new_version_reaches_every_copy(tree):
    edit(tree / "memtx_minimal/__init__.py", "1.2.0", "1.3.0")
    drift, broken = sync.sync(tree, check=True)
    assert len(drift) == 4 and not broken  # two cells, the README and the citation
    sync.sync(tree)
    for copy in ("CITATION.cff", "README.md", "notebooks/01_tiny.py"):
        assert "1.3.0" in sync.read(tree / copy) and "1.2.0" not in sync.read(tree / copy)


@pytest.mark.parametrize(
    "url, real",
    [
        (URL, True),
        ("https://github.com/a/b.c_d", True),
        ("https://github.com/no_address_yet/memtx-minimal", False),
        ("https://github.com/two--hyphens/b", False),
        ("https://github.com/-a/b", False),
        ("https://github.com/_a/b", False),
        ("https://github.com/a-/b", False),
        ("https://github.com/a", False),
        ("https://github.com/a/b/c", False),
        ("http://github.com/a/b", False),
        ("https://github.com.example.org/a/b", False),
    ],
)
def test_which_addresses_could_exist(url, real):
    assert sync.is_real(url) == real


def test_the_address_of_this_repository_is_real_or_nobodys():
    """No third way: one that is not yet ours must be one that nobody can register."""
    url = sync.home(sync.ROOT).url
    account = url.split("/")[3]
    assert sync.is_real(url) or "_" in account
    assert url != "https://github.com/memtx-minimal/memtx-minimal"  # stood here once


def test_where_pages_shows_the_book():
    assert sync.site("https://github.com/Some-One/Book") == "https://some-one.github.io/Book/"
    assert sync.site("https://github.com/Me/me.github.io") == "https://me.github.io/"


@pytest.fixture
def placeholder(tree):
    """The tree before the project has its address."""
    edit(tree / "pyproject.toml", "someone", "some_one")
    sync.sync(tree)
    assert sync.sync(tree, check=True) == ([], [])
    return tree


def run_first_cell(tree, monkeypatch, installed, host=""):
    """Run the cell that installs, on a machine that has the package or has it not.

    Returns the commands that it ran."""
    ran, find = [], (lambda name: object()) if installed else (lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", find)
    monkeypatch.setattr(subprocess, "check_call", ran.append)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    if host == "colab":
        monkeypatch.setitem(sys.modules, "google.colab", sys)
    if host == "kaggle":
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    exec(read_cells(tree)[1].source, {})
    return ran


@pytest.mark.parametrize("host", ["colab", "kaggle"])
def test_with_an_address_the_release_is_installed(tree, monkeypatch, host):
    ((*pip, dependency, package),) = run_first_cell(tree, monkeypatch, False, host)
    assert pip[:4] == [sys.executable, "-m", "pip", "install"] and "--no-deps" in pip
    assert package == f"git+{URL}@v1.2.0"


def test_a_notebook_downloaded_alone_says_what_to_install(tree, monkeypatch):
    with pytest.raises(ModuleNotFoundError, match=rf"pip install git\+{URL}@v1.2.0"):
        run_first_cell(tree, monkeypatch, installed=False)


def test_badges_open_the_release(tree):
    text = read_cells(tree)[0].source
    assert text.count("(https://") == 4
    assert text.count("someone/somewhere/blob/v1.2.0/notebooks/01_tiny.ipynb") == 2
    assert "someone/somewhere/raw/v1.2.0/notebooks/01_tiny.ipynb" in text
    assert "https://codespaces.new/someone/somewhere)" in text


@pytest.mark.parametrize("host", ["", "colab", "kaggle"])
def test_without_an_address_nothing_is_installed(placeholder, monkeypatch, host):
    with pytest.raises(ModuleNotFoundError, match="no public address yet"):
        run_first_cell(placeholder, monkeypatch, False, host)
    assert "subprocess" not in read_cells(placeholder)[1].source


def test_without_an_address_nothing_leads_there(placeholder):
    for copy in ("README.md", "notebooks/01_tiny.py", "notebooks/01_tiny.ipynb"):
        text = sync.read(placeholder / copy)
        assert "no public address yet" in text
        assert "http" not in text


@pytest.mark.parametrize("host", ["", "colab", "kaggle"])
@pytest.mark.parametrize("where", ["tree", "placeholder"])
def test_where_it_is_installed_the_first_cell_does_nothing(
    where, host, request, monkeypatch
):
    tree = request.getfixturevalue(where)
    assert not run_first_cell(tree, monkeypatch, True, host)


def test_a_drifted_badge(tree):
    for suffix in ("py", "ipynb"):
        edit(tree / f"notebooks/01_tiny.{suffix}", "github/someone", "github/nobody")
    drift, _ = sync.sync(tree, check=True)
    assert len(drift) == 1 and "the badges cell does not follow project.urls" in drift[0]


def test_a_readme_without_its_markers(tree):
    edit(tree / "README.md", "sync: links", "links")
    assert "0 blocks from '<!-- sync: links -->'" in sync.sync(tree, check=True)[1][0]


@pytest.mark.parametrize("tag, file", sync.PICTURES.items())
def test_the_front_pages_show_what_the_notebook_shows(tree, tag, file):
    picture = nbformat.v4.new_output("display_data", data={"image/png": "iVBORw=="})
    figure = nbformat.v4.new_code_cell("draw()", metadata={"tags": [tag]}, outputs=[picture])
    edit_cells(tree, lambda cells: [*cells, figure])
    (tree / "book/_static").mkdir()
    assert sync.sync(tree, check=True)[0] == [f"{file} is not the figure that 01_tiny shows"]
    sync.sync(tree)
    assert (tree / "book/_static" / file).read_bytes() == b"\x89PNG"
    assert sync.sync(tree, check=True) == ([], [])
