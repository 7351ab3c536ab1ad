"""Running notebooks: what is kept of a run, and what an author's edit during the run does to it; and what the page is given."""

import json
import re
import subprocess
import sys
from pathlib import Path

import build
import execute
import nbformat
import pytest
import sync
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent

PROGRESS = """import sys, time
for i in range(3):
    print(f"\\r{i} of 3", end="", file=sys.stderr, flush=True)
    time.sleep(0.01)
print("\\r      \\r", end="", file=sys.stderr)
print("done")"""


def test_a_run_leaves_nothing_of_the_machine_behind(tmp_path, capsys):
    nb = new_notebook(cells=[new_markdown_cell("Text."), new_code_cell(PROGRESS), new_code_cell("1 + 1")])
    execute.execute(nb, tmp_path, "notebook 1 of 1")
    assert [c.get("execution_count") for c in nb.cells] == [None, 1, 2]
    assert [out.text for out in nb.cells[1].outputs] == ["done\n"]
    assert all("execution" not in c.metadata for c in nb.cells) and nb.metadata.language_info == {"name": "python"}
    assert "notebook 1 of 1  cell 2 of 2" in capsys.readouterr().out


def test_a_failing_cell_is_named(tmp_path):
    nb = new_notebook(cells=[new_code_cell("1"), new_code_cell("1 / 0")])
    with pytest.raises(SystemExit, match=r"(?s)notebook 1 of 1, code cell \[2\] failed:.*ZeroDivisionError"):
        execute.execute(nb, tmp_path, "notebook 1 of 1")


WHICH_PYTHON = f"""import os, sys
assert sys.executable == {sys.executable!r} and "WRONG_PYTHON" not in os.environ
assert "left_over" not in globals()"""


@pytest.fixture
def misleading(tmp_path, monkeypatch):
    """A notebook that fails unless it runs in a clean kernel of this very Python, on a
    machine where "python3" is another kernel and start-up files define a name."""
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    wrong = {"argv": argv, "env": {"WRONG_PYTHON": "yes"}, "display_name": "Wrong"}
    nb = new_notebook(cells=[new_code_cell(WHICH_PYTHON)])
    nb.metadata.kernelspec = {"name": "elsewhere", "display_name": "Of another machine"}
    texts = {
        "jupyter/kernels/python3/kernel.json": json.dumps(wrong),
        "ipython/profile_default/startup/0.py": "left_over = 1",
        "start.py": "left_over = 1",
        "01_tiny.ipynb": nbformat.writes(nb),
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "start.py"))
    return tmp_path / "01_tiny.ipynb"


def test_a_run_is_in_the_python_that_starts_it(misleading):
    nb = nbformat.read(misleading, as_version=4)
    execute.execute(nb, misleading.parent, "notebook 1 of 1")
    assert nb.cells[0].execution_count == 1


def test_make_test_runs_the_notebooks_in_its_own_python(misleading, monkeypatch):
    monkeypatch.delenv("IPYTHONDIR")
    monkeypatch.delenv("PYTHONSTARTUP")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # quicker
    makefile = sync.read(ROOT / "Makefile")
    (options,) = re.findall(r"pytest -p no:cacheprovider (--nbval.*)", makefile)
    pytest = [sys.executable, "-m", "pytest", "-p", "nbval.plugin"]
    done = subprocess.run(
        [*pytest, *options.split(), misleading.name],
        cwd=misleading.parent,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")


def test_the_benchmarks_run_a_notebook_in_their_own_python(misleading, monkeypatch):
    monkeypatch.delenv("IPYTHONDIR")
    monkeypatch.delenv("PYTHONSTARTUP")
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    import sides

    monkeypatch.setattr(sides, "NOTEBOOKS", misleading.parent)
    assert sides.notebook("01_tiny")["minutes"] < 1


@pytest.fixture
def edit_during_run(tmp_path, monkeypatch):
    """Refresh a small notebook while an author replaces a text in it; the run itself is a stand-in. Returns what is kept."""
    path = tmp_path / "01_small.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("Old."), new_code_cell("x = 1")]), path)
    monkeypatch.setattr(sync, "sync", lambda: ([], []))

    def refresh(old, new):
        def run(nb, folder, label):
            nb.metadata.language_info = {"name": "python"}
            nb.cells[1].update(execution_count=1, outputs=[new_output("stream", text="ran\n")])
            sync.write(path, sync.read(path).replace(old, new))

        monkeypatch.setattr(execute, "execute", run)
        execute.refresh(path, "")
        return nbformat.read(path, as_version=4)

    return refresh


def test_prose_may_be_edited_while_it_runs(edit_during_run):
    nb = edit_during_run("Old.", "New.")
    assert nb.cells[0].source == "New." and nb.cells[1].outputs[0].text == "ran\n"


def test_outputs_of_other_code_are_not_kept(edit_during_run):
    with pytest.raises(SystemExit, match="code was edited while it ran"):
        edit_during_run("x = 1", "x = 2")


def test_what_sync_cannot_settle_makes_a_refresh_fail(monkeypatch, capsys):
    answers = iter([([], []), ([], ["settle this"])])
    monkeypatch.setattr(sync, "sync", lambda: next(answers))
    monkeypatch.setattr(sync, "notebooks", list)
    monkeypatch.setattr(sync, "solutions", list)
    monkeypatch.setattr(sys, "argv", ["execute.py"])
    with pytest.raises(SystemExit, match="True"):
        execute.main()
    assert "settle this" in capsys.readouterr().out


def picture(**metadata):
    return new_output("display_data", data={"image/png": "", "text/plain": ""}, metadata={"image/png": metadata})


def test_the_page_is_given_the_words_for_a_picture():
    nb = new_notebook(
        cells=[new_code_cell(outputs=[picture(alt="A line.", width=640)]), new_code_cell(metadata={"tags": ["colab-install"]})]
    )
    build.dress(nb)
    assert nb.cells[0].metadata.mystnb == {"image": {"alt": "A line.", "width": "640"}}
    assert "remove-cell" in nb.cells[1].metadata.tags


def test_two_pictures_in_a_cell_are_refused():
    with pytest.raises(SystemExit, match="cell 1 shows 2 pictures"):
        build.dress(new_notebook(cells=[new_code_cell(outputs=[picture(alt="One."), picture(alt="Two.")])]))
