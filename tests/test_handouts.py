"""Handouts: what is taught is blank for students, and the rest runs with what they write."""

import importlib
import re

import execute
import handouts
import nbformat
import pytest
import sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from memtx_minimal.exercises import EXERCISES, TAUGHT, NotRight, require

QUICK = "b_fast_lsh"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handouts")
    handouts.write(folder)
    return folder


def read(folder, reader, name):
    return nbformat.read(folder / reader / f"{name}.ipynb", as_version=4)


def test_a_body_goes_and_the_first_lines_stay():
    source = 'def f(x):\n    """x (T,).\n\n    And more."""\n    y = x\n    return y'
    assert handouts.blanked(source, "1.f") == (
        'def f(x):\n    """x (T,).\n\n    And more."""\n'
        '    # your code here\n    raise NotImplementedError("1.f")'
    )
    source = "class A:\n    def g(self):\n        return 1\n\n    def h(self):\n        return 2"
    assert handouts.blanked(source, "1.A.g", "g") == (
        "class A:\n    def g(self):\n        # your code here\n"
        '        raise NotImplementedError("1.A.g")\n\n    def h(self):\n        return 2'
    )


@pytest.mark.parametrize("name", sync.notebooks())
def test_both_handouts_of_a_chapter(folder, name):
    student, teacher = (read(folder, reader, name) for reader in ("student", "teacher"))
    for nb in (student, teacher):
        nbformat.validate(nb)
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in nb.cells)
        assert not [c for c in nb.cells if "solutions/" in c.source]
    numbers = [n for n, _ in handouts.blanks(name).values()]
    for nb in (student, teacher):
        text = "\n".join(c.source for c in nb.cells)
        assert set(re.findall(r'exercises\.require\("([\w.]+)"', text)) == set(numbers)
    differ = [(a, b) for a, b in zip(student.cells, teacher.cells, strict=True) if a.source != b.source]
    assert len(differ) == 1 + len(numbers)  # the note at the top, and the blanks
    files = [path.stem for path in sync.chapter_modules(sync.ROOT, name)]
    known = {}
    for file in files:
        known |= vars(importlib.import_module(f"memtx_minimal.{file}"))
    for blank, filled in differ[1:]:
        assert "your code here" in blank.source
        definition = re.findall(r"(?m)^(?:class|def) (\w+)", blank.source)[0]
        number, _ = handouts.blanks(name)[definition]
        exec(blank.source, student_has := dict(known))
        with pytest.raises(NotRight, match=f"^{number}: your code is still missing. Write it in the cell above"):
            require(number, student_has[definition])
        exec(filled.source, teacher_has := dict(known))
        require(number, teacher_has[definition])


def test_every_chapter_with_exercises_has_blanks():
    chapters = {n.split(".")[0] for n in EXERCISES} - {"5"}  # which teaches no new code
    assert {n.split(".")[0] for n in TAUGHT} == chapters


def test_the_filled_one_runs(folder):
    execute.execute(read(folder, "teacher", QUICK), folder, QUICK)


def test_the_empty_one_stops_at_the_first_blank(folder):
    nb = read(folder, "student", QUICK)
    client = NotebookClient(nb, kernel_manager_class=execute.ThisPython, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    with pytest.raises(CellExecutionError):
        client.execute()
    outputs = [out for cell in nb.cells for out in cell.get("outputs", []) if out.output_type == "error"]
    assert [out.ename for out in outputs] == ["NotRight"]
    assert outputs[0].traceback == [outputs[0].evalue]  # words alone
    assert outputs[0].evalue.startswith("B.inverse: your code is still missing")
