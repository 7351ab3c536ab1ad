"""Notebooks for students: `make handouts` writes them into book/_build/handouts.

student/NN_name.ipynb has no outputs, and of each function that
memtx_minimal/exercises lists as `taught` only the first lines: its body is for the
student to write. A check after it compares with the true one, and the rest of the
chapter runs with what the student wrote. teacher/NN_name.ipynb is the same, filled in.
"""

import argparse
import ast
import re
import shutil

import nbformat
import sync

from memtx_minimal.exercises import TAUGHT

FOLDER = sync.ROOT / "book" / "_build" / "handouts"
NOTE = (
    """**Handout.** {what} In the exercises at the end, write where the dots stand."""
)
BLANKS = (
    "In {n} cells a part is missing: write it where it says `your code here`. The check below each tells you whether it is right, "
    "and the rest of the notebook then runs with what you wrote."
)


def chapter(name):
    """The number of a chapter as exercises have it: 01_name -> 1, a_name -> A."""
    number, _ = sync.split_name(name)
    return (number.lstrip("0") or "0").upper()


def blanks(name):
    """{definition: (number, method or None)} of what a chapter leaves blank."""
    found = {}
    for number in TAUGHT:
        of, definition, *method = number.split(".")
        if of == chapter(name):
            found[definition] = number, method[0] if method else None
    return found


def blanked(source, number, method=None):
    """The source of a function, or of a class, without the body of it or of a method."""
    (node,) = ast.parse(source).body
    if method:
        (node,) = [n for n in node.body if getattr(n, "name", None) == method]
    lines, first = source.splitlines(), node.body[0]
    is_docstring = ast.get_docstring(node) is not None
    start = first.end_lineno if is_docstring else first.lineno - 1
    indent = " " * first.col_offset
    body = [
        f"{indent}# your code here",
        f'{indent}raise NotImplementedError("{number}")',
    ]
    return "\n".join(lines[:start] + body + lines[node.end_lineno :])


def handout(nb, name, empty):
    """A chapter for students, as a new notebook; not empty: for the teacher."""
    missing, cells = blanks(name), []
    what = BLANKS.format(n=len(missing)) if empty else "This one is filled in."
    for cell in nb.cells:
        if "badges" in cell.metadata.get("tags", []):
            cells.append(nbformat.v4.new_markdown_cell(NOTE.format(what=what)))
            continue
        cell = nbformat.from_dict(cell)
        cells.append(cell)
        if cell.cell_type == "markdown":
            cell.source = re.sub(
                r" ?All \[solutions\]\([^)]*\)[^.]*\.", "", cell.source
            )
            continue
        cell.outputs, cell.execution_count = [], None
        names = re.findall(r"(?m)^(?:class|def) (\w+)", cell.source)
        if "from-module" in cell.metadata.get("tags", []) and names[0] in missing:
            number, method = missing.pop(names[0])
            if empty:
                cell.source = blanked(cell.source, number, method)
            check = f'exercises.require("{number}", {names[0]})'
            cells.append(nbformat.v4.new_code_cell(check))
    if missing:
        raise ValueError(f"{name} has no from-module cell for {', '.join(missing)}")
    new = nbformat.v4.new_notebook(cells=cells, metadata=nb.metadata)
    for n, cell in enumerate(new.cells):
        cell.id = f"cell-{n}"  # the same at every run
    return new


def write(folder=FOLDER, names=None):
    """Both handouts of each chapter; the folder is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in names or sync.notebooks():
        nb = nbformat.read(sync.ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        for reader, empty in (("student", True), ("teacher", False)):
            (folder / reader).mkdir(parents=True, exist_ok=True)
            text = nbformat.writes(handout(nb, name, empty)) + "\n"
            sync.write(folder / reader / f"{name}.ipynb", text)
        print(f"{name}: {len(blanks(name))} blanks")


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.parse_args()
    write()
    print(f"The handouts are in {FOLDER}")


if __name__ == "__main__":
    main()
