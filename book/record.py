"""Record what several seeds give: `make record NAME=01_ablation`.

A live run of a notebook is one seed. Where a claim compares what the seed moves, the
notebook draws the live run upon a band and checks it: the same values from five seeds
or more, recorded beforehand in memtx_minimal/recorded/NAME.json, read by `bands.load`.

NAME is the number or letter of a notebook, and a function that it defines, from a seed
to {label: a number, or an array of them}. All that the function needs stands in the
notebook's cells tagged `setup` (imports, text, sizes), `from-module` and `band`. They
are run in their order, afresh for each seed, on the CPU and on the published text, in
two processes of one thread.

Recorded with the values is the code that made them: a hash of each definition, in the
notebook and in the package, that the function reaches. Comments, docstrings, layout and
the words of errors do not count. A test fails when one has changed. Without a NAME,
`make record` records each band anew of which that is true.
"""

import argparse
import ast
import hashlib
import io
import json
import linecache
import os
import signal
import sys
import time
import types
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from multiprocessing import get_context

import jupytext
import numpy as np
import sync

from memtx_minimal import __version__

ROOT = sync.ROOT
PACKAGE = "memtx_minimal"
TAGS = {"setup", "from-module", "band"}
N_SEEDS, N_PROCESSES = 5, 2


# ---------------------------------------------------------------- the code of a band


class Source:
    """A file or a notebook: the statements at its top level that define a name, or
    change what it names, and where it imports others from, {name: "package.file.name"}.
    """

    def __init__(self, file, text):
        self.file, self.definitions, self.imports = file, {}, {}
        tree = ast.parse(text)
        for statement in tree.body:
            for name in defined(statement):
                self.definitions.setdefault(name, []).append(statement)
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                package = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = package + alias.name

    def find(self, used):
        """(file, name) of what is used by an expression a.b.c, if it is from here or
        from the package."""
        first, _, rest = used.partition(".")
        if first in self.definitions:
            yield self.file, first
        package, file, name, *_ = f"{self.imports.get(first, '')}.{rest}..".split(".")
        if package == PACKAGE:
            yield file, name


def defined(statement):
    """The names that a statement defines, or in which it sets something."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if isinstance(statement, definitions):
        return {statement.name}
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, definitions):
            names.add(node.name)
        elif isinstance(getattr(node, "ctx", None), ast.Store):
            names.add(dotted(node).partition(".")[0])
    return names - {""}


def dotted(node):
    """An expression like a.b.c, or a.b[0].c up to the bracket; "" for any other."""
    if isinstance(node, ast.Subscript):
        return dotted(node.value)
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return before and f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def nodes(node):
    """A node of the code and all below it, but for what is raised: that ends the run,
    whatever it says."""
    yield node
    if not isinstance(node, ast.Raise):
        for child in ast.iter_child_nodes(node):
            yield from nodes(child)


def plain(node):
    """Code as a text that is the same as long as the code does the same, whatever its
    comments, docstrings, layout and words of errors, on each version of Python.

    (What `ast.dump` and `ast.unparse` give changes with the version.)
    """
    if isinstance(node, list):
        return f"[{' '.join(map(plain, node))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    if isinstance(node, ast.Raise):
        return "raise"
    fields = {k: v for k, v in ast.iter_fields(node) if v is not None and v != []}
    fields.pop("kind", None)  # whether a text is written u"..."
    if isinstance(fields.get("body"), list):
        fields["body"] = [s for s in node.body if not is_docstring(s)]
    if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty texts into some
        fields["values"] = [v for v in node.values if getattr(v, "value", None) != ""]
    inside = " ".join(f"{name}={plain(value)}" for name, value in fields.items())
    return f"{type(node).__name__}({inside})"


def is_docstring(statement):
    """Whether a statement is nothing but a text."""
    if not isinstance(statement, ast.Expr):
        return False
    return isinstance(getattr(statement.value, "value", None), str)


def matters(file, name, used_by):
    """Whether a definition may have made a value of another that uses it: no check did,
    as it returns nothing; nor did what stands in for the published text, which a
    recording insists on."""
    if used_by == ("corpora", "tiny_shakespeare"):
        return name not in ("_download", "synthetic_play")
    return file != "inputs" or not name.startswith("check_")


def notebook(name, root=ROOT):
    """The notebook of a band: 01_ablation -> 01_transformer_xl."""
    number, _, _ = name.partition("_")
    for found in sync.notebooks(root):
        if sync.split_name(found)[0] == number:
            return found
    raise ValueError(f"{name}: there is no notebook {number}_...")


def cells(name, root=ROOT):
    """The source of the cells that a band's function needs, as one text."""
    text = sync.read(root / "notebooks" / f"{notebook(name, root)}.py")
    found = jupytext.reads(text, fmt=sync.PERCENT).cells
    tagged = [c.source for c in found if TAGS & set(c.metadata.get("tags", []))]
    return "\n\n".join(tagged)


def code(name, root=ROOT):
    """The code of a band, {"file.name": hash}: its function, and each definition that
    the function reaches."""
    file, function = notebook(name, root), name.partition("_")[2]
    sources = {file: Source(file, cells(name, root))}
    if function not in sources[file].definitions:
        raise ValueError(f"{name}: no cell of {file} tagged `band` defines {function}")
    hashes, seen, todo = {}, set(), {(file, function)}
    while todo:
        file, name = todo.pop()
        seen.add((file, name))
        path = root / PACKAGE / f"{file}.py"
        if file not in sources:
            sources[file] = Source(file, sync.read(path) if path.exists() else "")
        source = sources[file]
        statements = source.definitions.get(name, [])
        used = {name, *(dotted(node) for s in statements for node in nodes(s))}
        if statements:
            imported = {source.imports.get(u.partition(".")[0], "") for u in used}
            text = "\n".join([*map(plain, statements), *sorted(imported)])
            digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
            hashes[f"{file}.{name}"] = digest[:16]
        reached = {found for u in used for found in source.find(u)}
        todo |= {found for found in reached - seen if matters(*found, (file, name))}
    return hashes


def changed(name, root=ROOT):
    """The definitions that are not as they were when a band was recorded."""
    then, now = read(name, root)["code"], code(name, root)
    return sorted(key for key in then | now if then.get(key) != now.get(key))


# ---------------------------------------------------------------- the recording


def names(root=ROOT):
    """The names of all the bands that are recorded."""
    return sorted(path.stem for path in (root / PACKAGE / "recorded").glob("*.json"))


def read(name, root=ROOT):
    """All that is recorded of a band."""
    return json.loads(sync.read(root / PACKAGE / "recorded" / f"{name}.json"))


def prepare():
    """Make this process one of one thread, which Ctrl-C ends at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for library in ("OMP", "MKL", "OPENBLAS"):
        os.environ[f"{library}_NUM_THREADS"] = "1"
    os.environ["MPLBACKEND"] = "agg"
    import torch  # after the above

    torch.set_num_threads(1)


def run(source, function, seed):
    """The values of one seed, and the name of the text. What is printed is dropped."""
    import torch

    from memtx_minimal import corpora, training

    training.best_device = lambda: torch.device("cpu")  # equal on all machines
    warnings.simplefilter("error", corpora.SyntheticTextWarning)
    module = sys.modules["notebook"] = types.ModuleType("notebook")
    linecache.cache["cells"] = len(source), None, source.splitlines(True), "cells"
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        exec(compile(source, "cells", "exec"), vars(module))
        values = getattr(module, function)(seed)
    return numbers(values), getattr(getattr(module, "corpus", None), "name", None)


def numbers(values):
    """What a band's function gave, {label: a number, or a list}, in five digits."""
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values):
        raise ValueError(f"a band is {{label: a number, or an array}}, not {values!r}")
    result = {}
    for label, value in values.items():
        array = np.asarray(value, dtype=float)
        if not np.isfinite(array).all():
            raise ValueError(f"{label}: {value!r} is not finite")
        result[label] = np.vectorize(lambda x: float(f"{x:.5g}"))(array).tolist()
    return result


def record(name, n_seeds=N_SEEDS, root=ROOT):
    """Run a band's function for the seeds 0 ... n_seeds - 1 and write what they gave."""
    made_by, source = code(name, root), cells(name, root)
    function, results, start = name.partition("_")[2], {}, time.monotonic()
    spawn = get_context("spawn")
    with ProcessPoolExecutor(N_PROCESSES, spawn, initializer=prepare) as pool:
        jobs = {pool.submit(run, source, function, s): s for s in range(n_seeds)}
        try:
            for job in as_completed(jobs):
                results[jobs[job]] = job.result()
                minutes, seconds = divmod(int(time.monotonic() - start), 60)
                progress = f"seed {jobs[job]}, {len(results)} of {n_seeds}"
                print(f"{name}  {progress}  {minutes}:{seconds:02}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    values, texts = zip(*(results[seed] for seed in sorted(results)))
    shapes = [{label: np.shape(value) for label, value in v.items()} for v in values]
    if shapes != shapes[:1] * n_seeds:
        raise ValueError(f"{name}: the seeds differ in labels or shapes: {shapes}")
    reads_text = f"{notebook(name, root)}.corpus" in made_by
    content = {
        "code": made_by,
        "command": f"make record NAME={name} SEEDS={n_seeds}",
        "seeds": list(range(n_seeds)),
        "text": texts[0] if reads_text else None,
        "values": {label: [v[label] for v in values] for label in values[0]},
        "versions": {"memtx-minimal": __version__, "torch": version("torch")},
    }
    path = root / PACKAGE / "recorded" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    sync.write(path, as_json(content) + "\n")


def as_json(value, indent="\n"):
    """JSON with a line for each entry of a dict, sorted."""
    if not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + "  "
    entries = [
        f"{deeper}{json.dumps(key, ensure_ascii=False)}: {as_json(value[key], deeper)}"
        for key in sorted(value)
    ]
    return f"{{{','.join(entries)}{indent}}}"


def main():
    args = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    args.add_argument("names", metavar="NAME", nargs="*", help="such as 01_ablation")
    args.add_argument(
        "--seeds", type=int, default=N_SEEDS, help="how many (default: %(default)s)"
    )
    options = args.parse_args()
    if options.seeds < N_SEEDS:
        args.error(f"a band needs {N_SEEDS} seeds or more")
    sync.escape_unprintable()
    _, broken = sync.sync()
    if broken:
        sys.exit("\n".join(broken))
    try:
        todo = options.names or [name for name in names() if changed(name)]
        [code(name) for name in todo]  # is there such a function?
    except ValueError as error:
        sys.exit(str(error))
    for name in todo:
        try:
            record(name, options.seeds)
        except KeyboardInterrupt:
            sys.exit(f"stopped: nothing of {name} is written")
    if not todo:
        print("every band fits the code")


if __name__ == "__main__":
    main()
