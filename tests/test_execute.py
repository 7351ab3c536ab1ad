"""Running notebooks: what is kept of a run, and what an author's edit during the run does to it; and what the page is given."""

import build
import execute
import nbformat
import pytest
import sync
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

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
            path.write_text(path.read_text().replace(old, new))

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
