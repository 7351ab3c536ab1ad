"""Keep the copies equal to their sources: `make sync`. With --check, change nothing.

source                            copy
NN_name.py or NN_name.ipynb,      the other of the pair; outputs and cell ids stay
  whichever was edited
memtx_minimal/name.py             the cells tagged `from-module`, one for each class or
  (see also MODULES)              function; constants stand in other cells
project.urls in pyproject.toml    the cells tagged `badges` and `colab-install`, the
  and __version__ of the package  marked blocks of README.md, and lines of
                                  CITATION.cff and book/_config.yml

The address in project.urls is real if GitHub could give it to somebody. Until it is, as
under an account whose name has an underscore, nothing is installed from it and nothing
links to it: cells, README and book say instead that it is missing.

Which file of a pair was edited is decided by its content, never by its date. A file
that still says what the pair said at the last sync (kept in notebooks/.agreed) or in
the last commit has not been edited, and takes over what the other one says. If that
does not settle it, for example because both were edited, sync leaves the pair alone,
says where the two differ, and exits with 1. Merge them by hand, or name the file to
keep: `make sync TAKE=01_name.py`.
"""

import argparse
import ast
import base64
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PERCENT = "py:percent"


def notebooks(root=ROOT):
    """The names of the notebooks, in the book's order: 00_..., 01_..., a_..., b_..."""
    files = [p for p in (root / "notebooks").iterdir() if p.suffix in (".ipynb", ".py")]
    return sorted({p.stem for p in files if re.match(r"(\d\d|[ab])_", p.name)})


def solutions(root=ROOT):
    """The names of the notebooks with solutions, solutions/00_..., in the same order."""
    files = (root / "notebooks" / "solutions").glob("*.*")
    names = {p.stem for p in files if p.suffix in (".ipynb", ".py")}
    return [f"solutions/{name}" for name in notebooks(root) if name in names]


def split_name(name):
    """The number or letter of a notebook, and its chapter: 01_tiny -> 01, tiny."""
    return name.split("_", 1)


def read(path):
    return path.read_text(encoding="utf-8")


def escape_unprintable():
    """Print what the terminal's encoding lacks as an escape, rather than fail on it."""
    sys.stdout.reconfigure(errors="backslashreplace")


class Home(NamedTuple):
    """Where the project is found: its address, and the release that stands there."""

    url: str
    version: str

    @property
    def tag(self):
        return f"v{self.version}"


def home(root):
    """The address and the version, each from the one place where it stands."""
    project = tomllib.loads(read(root / "pyproject.toml"))["project"]
    package = read(root / "memtx_minimal" / "__init__.py")
    version = re.search(r'(?m)^__version__ = "(.+)"$', package)[1]
    return Home(project["urls"]["Repository"].rstrip("/"), version)


ACCOUNT = r"[A-Za-z\d](?:-?[A-Za-z\d]){0,38}"  # what GitHub takes as an account's name
REPOSITORY = re.compile(rf"https://github\.com/({ACCOUNT})/([\w.-]+)")


def is_real(url):
    """Whether the address could exist. One that anybody could register is not safe to
    install from, so a placeholder has to be one that nobody can."""
    return REPOSITORY.fullmatch(url) is not None


def site(url):
    """Where GitHub Pages shows the book of a repository."""
    account, repository = REPOSITORY.fullmatch(url).groups()
    root = f"https://{account.lower()}.github.io/"
    return root if root == f"https://{repository.lower()}/" else f"{root}{repository}/"


def links(home, name):
    """{what: address} of what a reader can do with a notebook. It opens as of the
    release that its first cell installs."""
    repository = home.url.removeprefix("https://github.com/")
    file = f"{repository}/blob/{home.tag}/notebooks/{name}.ipynb"
    kaggle = "https://kaggle.com/kernels/welcome?src=https://github.com"
    return {
        "Open in Colab": f"https://colab.research.google.com/github/{file}",
        "Open in Kaggle": f"{kaggle}/{file}",
        "Open in Codespaces": f"https://codespaces.new/{repository}",
        "Download this notebook": f"https://github.com/{file}".replace("/blob/", "/raw/"),
    }


NO_ADDRESS = "the project has no public address yet"
BADGES = f"""No links to Colab and Kaggle here: {NO_ADDRESS}.
To run this notebook, type `make lab` in your copy of the project."""


def badges(home, name):
    if not is_real(home.url):
        return BADGES
    return " · ".join(f"[{what}]({url})" for what, url in links(home, name).items())


NO_INSTALL = f"""import importlib.util

# Where memtx_minimal is installed, this cell does nothing.
if importlib.util.find_spec("memtx_minimal") is None:
    raise ModuleNotFoundError(
        "This notebook needs the package memtx_minimal and cannot fetch it: "
        "{NO_ADDRESS}. In your copy of the project, "
        "type: pip install ."
    )"""


def colab_install(home, name):
    if not is_real(home.url):
        return NO_INSTALL
    return f"""import importlib.util
import os
import subprocess
import sys

# Where memtx_minimal is installed, this cell does nothing.
if importlib.util.find_spec("memtx_minimal") is None:
    package = "git+{home.url}@{home.tag}"
    if "google.colab" not in sys.modules and "KAGGLE_KERNEL_RUN_TYPE" not in os.environ:
        raise ModuleNotFoundError(f"First type: pip install {{package}}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.check_call([*pip, "pooch", package])  # Colab and Kaggle have their torch"""


WHERE_IT_GOES = "CONTRIBUTING.md#the-address"


def readme_links(home, names):
    """Targets for the reference links of the README: [repository], [notebook 01], [colab 01], ..."""
    real = is_real(home.url)
    lines = [f"[repository]: {home.url if real else WHERE_IT_GOES}"]
    for name in names:
        number, _ = split_name(name)
        colab = links(home, name)["Open in Colab"] if real else WHERE_IT_GOES
        lines.append(f"[notebook {number}]: notebooks/{name}.ipynb")
        lines.append(f"[colab {number}]: {colab}")
    return "\n".join(lines)


def readme_clone(home, names):
    if not is_real(home.url):
        return f"```sh\ncd memtx-minimal  # your copy: {NO_ADDRESS}\n```"
    folder = home.url.rsplit("/", 1)[-1]
    return f"```sh\ngit clone {home.url}\ncd {folder}\n```"


def readme_badges(home, names):
    if not is_real(home.url):
        return f"There is nothing to open in Colab, Kaggle or Codespaces: {NO_ADDRESS} ([where it goes]({WHERE_IT_GOES}))."
    codespaces = links(home, names[0])["Open in Codespaces"]
    return f"[Read the book]({site(home.url)}) · [Open in Codespaces]({codespaces}) · [Report an error]({home.url}/issues/new/choose)"


MODULES = {  # chapters whose code stands in more than the one file that is named like the notebook
    "attention": ["vanilla_transformer"],
    "feedback_by_hand": ["fast_feedback"],
    "which_memory": [],  # teaches no new model
}
CELLS = {"badges": badges, "colab-install": colab_install}
PICTURES = {"readme-figure": "readme.png", "front-figure": "answers.png"}  # by the tag of the cell that shows it
BLOCKS = {"badges": readme_badges, "links": readme_links, "clone": readme_clone}  # in README.md, from <!-- sync: NAME --> to <!-- end -->
LINES = {  # in other files: what stands before the value, and which value it is
    "CITATION.cff": {"repository-code: ": "url", "version: ": "version"},
    "book/_config.yml": {"  url: ": "url"},
}


def definitions(path):
    """The top-level classes and functions of a file, with their decorators: {name: source}, in the file's order."""
    text = read(path)
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def constants(path):
    """The lines of each assignment at the top level of a file."""
    text = read(path)
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
    """The .py of a notebook, less its entry on pairing: pyproject.toml has one."""
    nb.metadata.pop("jupytext", None)
    return jupytext.writes(nb, fmt=PERCENT)


def tidy(text):
    """A .py as this jupytext writes it, so that only edits make a difference."""
    return percent(jupytext.reads(text, fmt=PERCENT))


def committed(path):
    """The text of a file in the last commit; None if there is none."""
    # GIT_DIR and the like, as set by a hook, may be about another repository.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "cat-file", "blob", f"HEAD:./{path.name}"]
    try:
        done = subprocess.run(
            command, cwd=path.parent, env=environment, capture_output=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode("utf-8")


def last_synced(py):
    """Where the text is kept on which the two files of a pair last agreed."""
    return py.parent / ".agreed" / py.name


def agreed(ipynb, py):
    """What both files of a pair are known to have said: at the last sync, in the last
    commit."""
    if last_synced(py).exists():
        yield tidy(read(last_synced(py)))
    text, notebook = committed(py), committed(ipynb)
    if text and notebook:
        text = tidy(text)
        if text == tidy(percent(nbformat.reads(notebook, as_version=4))):
            yield text


def file_name(path):
    """How an author names one file of a pair: 01_name.py, solutions/01_name.py."""
    inner = path.parent.name == "solutions"
    return f"solutions/{path.name}" if inner else path.name


def edited(ipynb, py, now, take):
    """Which file of a pair was edited, if that is sure, or is taken by its name.

    now: what each of them says. take: names of files that an author has chosen."""
    chosen = [path for path in (ipynb, py) if file_name(path) in take]
    if not chosen:
        before = set(agreed(ipynb, py))
        chosen = [path for path in (ipynb, py) if now[path] not in before]
    return chosen[0] if len(chosen) == 1 else None


def read_pair(ipynb, py, take=()):
    """The notebook of a pair, what drifted, and what an author has to settle."""
    nb = nbformat.read(ipynb, as_version=4) if ipynb.exists() else None
    if nb and py.exists():
        text = read(py)
        if text == percent(nb):
            return nb, [], []
        now = {ipynb: tidy(percent(nb)), py: tidy(text)}
        if now[ipynb] == now[py]:
            return nb, [f"{file_name(py)} is not as jupytext writes it"], []
        where = first_difference(now[py], now[ipynb])
        source = edited(ipynb, py, now, take)
        if source == ipynb:
            drift = f"{file_name(py)} takes over the edit of {file_name(ipynb)} ({where})"
            return nb, [drift], []
        if source == py:
            new = jupytext.reads(text, fmt=PERCENT)
            new = combine_inputs_with_outputs(new, nb, fmt=PERCENT)
            drift = f"{file_name(ipynb)} takes over the edit of {file_name(py)} ({where})"
            return new, [drift], []
        unsettled = (
            f"{file_name(py)} and {file_name(ipynb)} differ ({where}), and either may hold an edit "
            f"that the other lacks, so both were left alone. Merge them, or keep one: "
            f"make sync TAKE={file_name(py)} or make sync TAKE={file_name(ipynb)}"
        )
        return nb, [], [unsettled]
    if nb:
        return nb, [f"{file_name(py)} is missing; {file_name(ipynb)} has what it needs"], []
    nb = jupytext.reads(read(py), fmt=PERCENT)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python"}
    nb.metadata.setdefault("kernelspec", {**kernel, "name": "python3"})
    return nb, [f"{file_name(ipynb)} is missing; {file_name(py)} has what it needs"], []


def chapter_modules(root, name):
    """The files of the code that a notebook teaches."""
    _, chapter = split_name(name)
    files = MODULES.get(chapter, [chapter])
    return [root / "memtx_minimal" / f"{file}.py" for file in files]


def sync_modules(nb, name, modules):
    """Refresh the cells that mirror the modules of a chapter; returns what drifted and what an author has to mend."""
    if missing := [module.name for module in modules if not module.exists()]:
        files = " and ".join(missing)
        return [], [f"{name}: no memtx_minimal/{files}; mend sync.MODULES or add it"]
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


def sync_generated(nb, name, home):
    """Refresh the cells made from the repository's address and the version."""
    drift, broken = [], []
    for tag, make in CELLS.items():
        cells = tagged(nb, tag)
        if len(cells) != 1:
            broken.append(f"{name}: {len(cells)} cells tagged {tag} instead of one")
        for number, cell in cells:
            if cell.source != make(home, name):
                drift.append(f"{name}, cell {number}: the {tag} cell does not follow project.urls or the version")
                cell.source = make(home, name)
    return drift, broken


def sync_text(path, home, names):
    """Refresh the parts of a text file that are made from the repository's address: new text, what drifted, what is broken."""
    text = new = read(path)
    broken = []
    if path.name == "README.md":
        for block, make in BLOCKS.items():
            start, end = f"<!-- sync: {block} -->", "<!-- end -->"
            new, n = re.subn(f"(?s)({start}\n).*?({end})", lambda m, made=make(home, names): f"{m[1]}{made}\n{m[2]}", new)
            if n != 1:
                broken.append(f"README.md: {n} blocks from '{start}' to '{end}' instead of one")
    else:
        (lines,) = [lines for file, lines in LINES.items() if path.match(file)]
        for start, value in lines.items():
            line = start + getattr(home, value)
            new, n = re.subn(f"(?m)^{start}.*$", lambda _, line=line: line, new)
            if n != 1:
                broken.append(f"{path.name}: {n} lines '{start}...' instead of one")
    drift = [f"{path.name} does not follow project.urls or the version ({first_difference(text, new)})"] if new != text else []
    return new, drift, broken


def write(path, content):
    """Write all of a file, text or bytes, or nothing of it."""
    part = path.with_name(f".{path.name}.part")
    content = content.encode("utf-8") if isinstance(content, str) else content
    part.write_bytes(content)
    os.replace(part, path)


def picture(nb, tag):
    """The picture that the cell with this tag shows, as PNG bytes; None if there is none."""
    outputs = [out for _, cell in tagged(nb, tag) for out in cell.outputs]
    pictures = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    return base64.b64decode(pictures[0]) if pictures else None


def sync(root=ROOT, check=False, take=()):
    """Bring every copy up to date, or with check leave them.

    take: names of notebook files that win over the other of their pair in any case.
    Returns (drift, broken): what differed, what only an author can mend."""
    here, names = home(root), notebooks(root)
    drift, broken = [], []
    for name in names + solutions(root):
        ipynb, py = (root / "notebooks" / f"{name}.{half}" for half in ("ipynb", "py"))
        nb, changes, faults = read_pair(ipynb, py, take)
        if faults:
            broken += faults
            continue
        mirrored = [], []  # solutions teach no module
        if name in names:
            mirrored = sync_modules(nb, name, chapter_modules(root, name))
        for more, faults in [mirrored, sync_generated(nb, name, here)]:
            changes, broken = changes + more, broken + faults
        if changes and not check:
            write(py, percent(nb))
            if not ipynb.exists() or nb != nbformat.read(ipynb, as_version=4):
                write(ipynb, nbformat.writes(nb) + "\n")
        if not check:
            last_synced(py).parent.mkdir(exist_ok=True)
            write(last_synced(py), percent(nb))
        drift += changes
        for tag, file in PICTURES.items():
            shown, copy = picture(nb, tag), root / "book" / "_static" / file
            if shown and (not copy.exists() or copy.read_bytes() != shown):
                drift.append(f"{copy.name} is not the figure that {name} shows")
                if not check:
                    write(copy, shown)
    for path in [root / "README.md", *(root / file for file in LINES)]:
        text, changes, faults = sync_text(path, here, names)
        if changes and not check:
            write(path, text)
        drift, broken = drift + changes, broken + faults
    return drift, broken


def main():
    args = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit with 1 if anything has drifted",
    )
    args.add_argument(
        "--take",
        metavar="FILE",
        action="append",
        default=[],
        help="keep this file of a pair that differs, like 01_name.py; may be repeated",
    )
    options = args.parse_args()
    names = notebooks(ROOT) + solutions(ROOT)
    files = [f"{name}.{half}" for name in names for half in ("py", "ipynb")]
    if unknown := [file for file in options.take if file not in files]:
        unknown, files = ", ".join(unknown), ", ".join(files)
        args.error(f"no notebook file {unknown}: choose from {files}")
    escape_unprintable()
    drift, broken = sync(ROOT, options.check, options.take)
    for line in drift:
        print(("drifted: " if options.check else "synced: ") + line)
    for line in broken:
        print("mend by hand: " + line)
    if not drift and not broken:
        print("everything in sync")
    sys.exit(bool(broken or (options.check and drift)))


if __name__ == "__main__":
    main()
