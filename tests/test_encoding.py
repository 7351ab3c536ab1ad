"""The tools read and write UTF-8, whatever the encoding of the locale they run in."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check_pages
import pytest
import sync
from nbformat import writes
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    path.relative_to(ROOT)
    for folder in ("book", "memtx_minimal", "notebooks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not {"_build", ".venv"}.intersection(path.relative_to(ROOT).parts)
]


def is_text(call):
    """Whether a call, as it is written, reads or writes text in a file or a pipe."""
    given = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if last in ("read_text", "write_text", "popen", "getoutput", "getstatusoutput"):
        return True
    if last in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        after_file = name in ("open", "io.open", "os.fdopen")
        modes = [getattr(a, "value", None) for a in call.args[after_file:][:1]]
        usual = "w+b" if last.endswith("File") else "r"
        mode = given.get("mode", modes[0] if modes else usual)
        # Not every open takes a mode: Image.open(file) does not, and reads no text.
        return isinstance(mode, str) and bool(re.fullmatch("[rwaxt+]+", mode))
    return any(given.get(word) is True for word in ("text", "universal_newlines"))


def encoding(call):
    """How a call names its encoding, as it is written; None if it does not."""
    place = {"read_text": 0, "write_text": 1}.get(getattr(call.func, "attr", None), 9)
    named = [word.value for word in call.keywords if word.arg == "encoding"]
    named += call.args[place : place + 1]
    return ast.unparse(named[0]) if named else None


def left_to_the_locale(source):
    """The numbers of the lines where the locale chooses the encoding of a text."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    texts = [call for call in calls if is_text(call)]
    left = (None, "None", "'locale'")
    return sorted(call.lineno for call in texts if encoding(call) in left)


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_every_text_has_its_encoding(path):
    lines = left_to_the_locale((ROOT / path).read_text(encoding="utf-8"))
    assert not lines, f"name the encoding in {path}, lines {lines}: encoding='utf-8'"


@pytest.mark.parametrize(
    "call",
    [
        "open(path)",
        "open(path, 'w')",
        "open(path, mode='a+')",
        "open(path, encoding=None)",
        "open(path, encoding='locale')",
        "io.open(path, 'rt')",
        "path.open()",
        "(folder / name).open('x')",
        "gzip.open(path, mode='rt')",
        "os.fdopen(number)",
        "path.read_text()",
        "path.write_text(text, newline='')",
        "tempfile.NamedTemporaryFile('w')",
        "subprocess.run(command, text=True)",
        "Popen(command, universal_newlines=True)",
        "os.popen(command)",
    ],
)
def test_a_text_without_its_encoding_is_found(call):
    assert left_to_the_locale(f"x = 1\n{call}\n") == [2]


@pytest.mark.parametrize(
    "call",
    [
        "open(path, encoding='utf-8')",
        "open(path, 'rb')",
        "path.open('wb')",
        "path.open(mode='r', encoding='utf-8')",
        "Image.open(file)",
        "Image.open('picture.png')",
        "path.read_text(encoding='utf-8')",
        "path.read_text('utf-8')",
        "path.write_text(text, 'utf-8')",
        "path.read_bytes()",
        "tempfile.NamedTemporaryFile()",
        "tempfile.TemporaryFile(mode='w+b')",
        "subprocess.run(command, encoding='utf-8')",
        "subprocess.run(command, capture_output=True)",
        "new_output('stream', text='True')",
    ],
)
def test_what_is_no_text_or_has_its_encoding_passes(call):
    assert left_to_the_locale(call) == []


# Where text is CP1252, UTF-8's Á is an error, its – is three letters, π has no code.
WORDS = "Á – π → ≠"
MODULE = f'"""{WORDS}"""\n\n\ndef words():\n    return "{WORDS}"\n'


@pytest.fixture(scope="module")
def cp1252(tmp_path_factory):
    """The environment of a program on a machine where text is CP1252."""
    folder = tmp_path_factory.mktemp("locales")
    unset = ("PYTHONUTF8", "PYTHONIOENCODING", "LC_ALL", "LOCPATH")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if os.name != "nt":  # Windows needs no locale for it
        make = ["localedef", "-i", "en_US", "-f", "CP1252", folder / "en_US.CP1252"]
        try:
            subprocess.run(make, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a locale in CP1252 needs Debian's package locales: {error}")
        environment |= {"LOCPATH": str(folder), "LC_ALL": "en_US.CP1252"}
    ask = [sys.executable, "-c", "import sys; print(sys.stdout.encoding)"]
    answer = subprocess.run(ask, env=environment, capture_output=True, check=True)
    if answer.stdout.strip() != b"cp1252":
        pytest.skip(f"the locale is not in CP1252 but in {answer.stdout.decode()}")
    return environment


@pytest.fixture(scope="module")
def run(cp1252, tmp_path_factory):
    """Run a tool of a small repository of its own, with the words in every file."""
    tree = tmp_path_factory.mktemp("an Á of a folder")
    for folder in ("memtx_minimal", "notebooks"):
        (tree / folder).mkdir()
    ignored = shutil.ignore_patterns("_build", "__pycache__")
    shutil.copytree(ROOT / "book", tree / "book", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tree)
    old = MODULE[MODULE.index("def") :].replace(WORDS, "π").strip()
    cells = [
        new_markdown_cell(f"# A page\n\n{WORDS}"),
        new_markdown_cell(metadata={"tags": ["badges"]}),
        new_code_cell(metadata={"tags": ["colab-install"]}),
        new_code_cell(old, metadata={"tags": ["from-module"]}),
        new_code_cell(f"print('{WORDS}' + '!')"),
    ]
    texts = {
        "memtx_minimal/__init__.py": '__version__ = "1.0"\n',
        "memtx_minimal/tiny.py": MODULE,
        "book/_toc.yml": "format: jb-book\nroot: notebooks/01_tiny\n",
        "notebooks/01_tiny.ipynb": writes(new_notebook(cells=cells)),
    }
    for name, text in texts.items():
        (tree / name).write_bytes(text.encode())

    def run(*command):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tree,
            env=cp1252,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.tree = tree
    return run


def test_sync_where_text_is_cp1252(run):
    said = run("book/sync.py")
    assert rb"\u03c0" in said  # π, which this terminal cannot show
    for path in ("01_tiny.py", "01_tiny.ipynb"):
        text = (run.tree / "notebooks" / path).read_bytes()
        assert text.count(WORDS.encode()) == 3 and b"\r" not in text
    assert sync.sync(run.tree, check=True) == ([], [])


def test_the_book_where_text_is_cp1252(run):
    run("book/build.py", "--live")
    html = run.tree / "book" / "_build" / "html"
    page = (html / "notebooks" / "01_tiny.html").read_text(encoding="utf-8")
    assert f"{WORDS}!" in page
    assert check_pages.check(html)[0] == []
