"""Keep the copies equal to their sources: `make sync`; with --check, only say what has drifted and exit with 1.

source                                      copy
NN_name.py or NN_name.ipynb, the newer      the other of the pair (outputs and cell ids stay)
memtx_minimal/name.py (see also MODULES)    the cells tagged `from-module`, one for each class or function; constants stand in other cells
project.urls in pyproject.toml              the cells tagged `badges` and `colab-install`, the marked blocks of
                                            README.md, and a line each of CITATION.cff and book/_config.yml
"""

import argparse
import ast
import base64
import os
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PERCENT = "py:percent"


def address(root):
    """The repository's address, from the one place where it stands."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"].rstrip("/")


def colab(url, name):
    return url.replace("https://github.com/", "https://colab.research.google.com/github/") + f"/blob/main/notebooks/{name}.ipynb"


def badges(url, name):
    return f"[Open in Colab]({colab(url, name)}) · [Download this notebook]({url}/raw/main/notebooks/{name}.ipynb)"


def colab_install(url, name):
    return f"""import subprocess
import sys

if "google.colab" in sys.modules:  # anywhere else this cell does nothing; Colab keeps its own torch
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.check_call([*pip, "pooch", "git+{url}"])"""


def readme_links(url, names):
    """Targets for the reference links of the README: [repository], [notebook 01], [colab 01], ..."""
    links = [f"[repository]: {url}"]
    for name in names:
        links += [f"[notebook {name[:2]}]: notebooks/{name}.ipynb", f"[colab {name[:2]}]: {colab(url, name)}"]
    return "\n".join(links)


def readme_clone(url, names):
    return f"```sh\ngit clone {url}\ncd {url.rsplit('/', 1)[-1]}\n```"


MODULES = {  # chapters whose code stands in more than the one file that is named like the notebook
    "feedback_transformer": ["feedback_transformer", "feedback_segment"],
}
CELLS = {"badges": badges, "colab-install": colab_install}
BLOCKS = {"links": readme_links, "clone": readme_clone}  # in README.md, from <!-- sync: NAME --> to <!-- end -->
LINES = {"CITATION.cff": r"(?m)^(repository-code: ).*$", "book/_config.yml": r"(?m)^(  url: ).*$"}


def definitions(path):
    """The top-level classes and functions of a file, with their decorators: {name: source}, in the file's order."""
    text = path.read_text()
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def constants(path):
    """The lines of each assignment at the top level of a file."""
    text = path.read_text()
    lines = text.splitlines()
    return ["\n".join(lines[n.lineno - 1 : n.end_lineno]) for n in ast.parse(text).body if isinstance(n, ast.Assign)]


def tagged(nb, tag):
    """(number, cell) of each cell with this tag; cells count from 1, as a reader counts."""
    return [(i, c) for i, c in enumerate(nb.cells, 1) if tag in c.metadata.get("tags", [])]


def first_difference(a, b):
    a, b = a.splitlines(), b.splitlines()
    n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return f"line {n + 1}: {(a[n : n + 1] or ['(end)'])[0]!r} against {(b[n : n + 1] or ['(end)'])[0]!r}"


def percent(nb):
    """The .py of a notebook. That the two are a pair stands in pyproject.toml, for all notebooks: taken out of this one, if it is there."""
    nb.metadata.pop("jupytext", None)
    return jupytext.writes(nb, fmt=PERCENT)


def read_pair(ipynb, py):
    """The notebook of a pair, whose newer file wins, and a line on what the other one has to take over."""
    nb = nbformat.read(ipynb, as_version=4) if ipynb.exists() else None
    if nb and py.exists():
        text = py.read_text()
        if text == percent(nb):
            return nb, []
        where = first_difference(text, percent(nb))
        if ipynb.stat().st_mtime > py.stat().st_mtime:
            return nb, [f"{py.name} differs from {ipynb.name}, which is newer and wins ({where})"]
        new = combine_inputs_with_outputs(jupytext.reads(text, fmt=PERCENT), nb, fmt=PERCENT)
        return new, [f"{ipynb.name} differs from {py.name}, which is newer and wins ({where})"]
    if nb:
        return nb, [f"{py.name} is missing; {ipynb.name} has what it needs"]
    nb = jupytext.reads(py.read_text(), fmt=PERCENT)
    nb.metadata.setdefault("kernelspec", {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"})
    return nb, [f"{ipynb.name} is missing; {py.name} has what it needs"]


def sync_modules(nb, name, modules):
    """Refresh the cells that mirror the modules of a chapter; returns what drifted and what an author has to mend."""
    drift, broken, seen = [], [], []
    homes = {d: module for module in modules for d in definitions(module)}
    wanted = {d: source for module in modules for d, source in definitions(module).items()}
    files = " and ".join(module.name for module in modules)
    for number, cell in tagged(nb, "from-module"):
        names = re.findall(r"^(?:class|(?:async )?def) +(\w+)", cell.source, re.M)
        if len(names) != 1:
            broken.append(f"{name}, cell {number}: tagged from-module, holds {len(names)} definitions instead of one")
        elif names[0] not in wanted:
            broken.append(f"{name}, cell {number}: tagged from-module, but {files} defines no {names[0]}")
        else:
            seen += names
            source = wanted[names[0]]
            if cell.source != source:
                where = first_difference(cell.source, source)
                drift.append(f"{name}, cell {number}: {names[0]} differs from {homes[names[0]].name} ({where})")
                cell.source = source
    broken += [f"{name}: no cell for {d} of {homes[d].name}" for d in wanted if d not in seen]
    broken += [f"{name}: {d} stands in {seen.count(d)} cells" for d in wanted if seen.count(d) > 1]
    for module in modules:
        for lines in constants(module):
            if not any(cell.cell_type == "code" and lines in cell.source for cell in nb.cells):
                broken.append(f"{name}: no cell has the lines {lines!r} of {module.name}")
        order = [d for d in wanted if homes[d] == module]
        once = [d for d in dict.fromkeys(seen) if d in order]
        if once != [d for d in order if d in once]:
            broken.append(f"{name}: its cells go {', '.join(once)}; {module.name} goes {', '.join(order)}")
    return drift, broken


def sync_generated(nb, name, url):
    """Refresh the cells made from the repository's address."""
    drift, broken = [], []
    for tag, make in CELLS.items():
        cells = tagged(nb, tag)
        if len(cells) != 1:
            broken.append(f"{name}: {len(cells)} cells tagged {tag} instead of one")
        for number, cell in cells:
            if cell.source != make(url, name):
                drift.append(f"{name}, cell {number}: the {tag} cell does not follow project.urls in pyproject.toml")
                cell.source = make(url, name)
    return drift, broken


def sync_text(path, url, names):
    """Refresh the parts of a text file that are made from the repository's address: new text, what drifted, what is broken."""
    text = new = path.read_text()
    broken = []
    if path.name == "README.md":
        for block, make in BLOCKS.items():
            start, end = f"<!-- sync: {block} -->", "<!-- end -->"
            new, n = re.subn(f"(?s)({start}\n).*?({end})", lambda m, made=make(url, names): f"{m[1]}{made}\n{m[2]}", new)
            if n != 1:
                broken.append(f"README.md: {n} blocks from '{start}' to '{end}' instead of one")
    else:
        (pattern,) = [p for file, p in LINES.items() if path.match(file)]
        new, n = re.subn(pattern, rf"\g<1>{url}", new)
        if n != 1:
            broken.append(f"{path.name}: {n} lines like {pattern} instead of one")
    drift = [f"{path.name} does not follow project.urls ({first_difference(text, new)})"] if new != text else []
    return new, drift, broken


def write(path, content):
    """Write all of a file, text or bytes, or nothing of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def readme_figure(nb):
    """The picture that the cell tagged readme-figure shows, as PNG bytes; None if there is none."""
    outputs = [out for _, cell in tagged(nb, "readme-figure") for out in cell.outputs]
    pictures = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    return base64.b64decode(pictures[0]) if pictures else None


def sync(root=ROOT, check=False):
    """Bring every copy up to date, or with check leave them. Returns (drift, broken): what differed, what only an author can mend."""
    url, notebooks = address(root), root / "notebooks"
    names = sorted({p.stem for p in [*notebooks.glob("[0-9][0-9]_*"), *notebooks.glob("[ab]_*")] if p.suffix in (".ipynb", ".py")})
    drift, broken = [], []
    for name in names:
        ipynb, py = notebooks / f"{name}.ipynb", notebooks / f"{name}.py"
        nb, changes = read_pair(ipynb, py)
        modules = [root / "memtx_minimal" / f"{file}.py" for file in MODULES.get(name.split("_", 1)[1], [name.split("_", 1)[1]])]
        for more, faults in [sync_modules(nb, name, modules), sync_generated(nb, name, url)]:
            changes, broken = changes + more, broken + faults
        if changes and not check:
            write(py, percent(nb))
            if not ipynb.exists() or nb != nbformat.read(ipynb, as_version=4):
                write(ipynb, nbformat.writes(nb) + "\n")
        drift += changes
        picture, copy = readme_figure(nb), root / "book" / "_static" / "readme.png"
        if picture and (not copy.exists() or copy.read_bytes() != picture):
            drift.append(f"{copy.name} is not the figure that {name} shows")
            if not check:
                write(copy, picture)
    for path in [root / "README.md", *(root / file for file in LINES)]:
        text, changes, faults = sync_text(path, url, [name for name in names if name[0].isdigit()])
        if changes and not check:
            write(path, text)
        drift, broken = drift + changes, broken + faults
    return drift, broken


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--check", action="store_true", help="change nothing; exit with 1 if anything has drifted")
    check = args.parse_args().check
    drift, broken = sync(check=check)
    for line in drift:
        print(("drifted: " if check else "synced: ") + line)
    for line in broken:
        print("mend by hand: " + line)
    if not drift and not broken:
        print("everything in sync")
    sys.exit(bool(broken or (check and drift)))


if __name__ == "__main__":
    main()
