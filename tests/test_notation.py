"""One letter, one meaning: chapter 0 has the table, and no chapter departs from it."""

import re
from pathlib import Path

import pytest
import sync

ROOT = Path(__file__).resolve().parent.parent
HEADER = "| letter | meaning | letter | meaning |"
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
FILES = SCRIPTS + sorted((ROOT / "memtx_minimal").glob("*.py"))


def tables(path):
    """{letter: meaning} of each table of letters in a notebook, in their order."""
    found, rows = [], None
    for line in sync.read(path).splitlines():
        line = line.removeprefix("#").strip()
        if line == HEADER:
            found.append(rows := {})
        elif rows is not None and line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            for letter, meaning in zip(cells[::2], cells[1::2]):
                if re.fullmatch(r"`\w+`", letter):
                    rows[letter.strip("`")] = meaning
        elif line:
            rows = None
    return found


def gist(meaning):
    """What a letter means, without formula, chapter or the paper's name for it."""
    return re.split(r"[,:(]", meaning)[0].strip()


BOOK = tables(ROOT / "notebooks" / "00_attention.py")[-1]


def shapes(text):
    """What stands in brackets in the comments at the ends of lines."""
    for comment in re.findall(r"\S.*?  # (.*)", text):
        yield from re.findall(r"\(([\w+*/ ,.]+)\)", comment)


def test_the_table_of_the_book_stands_in_chapter_0():
    assert {"B", "T", "H", "L", "M", "K", "d_model", "d_head"} <= BOOK.keys()


def test_a_letter_that_stands_for_something_else_is_found(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(f"# {HEADER}\n# | --- | --- | --- | --- |\n# | `T` | trees, of `B` | | |\n#\n", "utf-8")
    assert tables(path) == [{"T": "trees, of `B`"}] and gist("trees, of `B`") != gist(BOOK["T"])
    assert [*shapes("x = y  # (B, Q, d): a (b)")] == ["B, Q, d", "b"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_chapter_uses_the_letters_as_the_book_does(path):
    for table in tables(path):
        for letter, meaning in table.items():
            assert gist(meaning) == gist(BOOK[letter]), f"{letter}: {meaning}, not {BOOK[letter]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shapes_are_written_in_these_letters(path):
    used = {letter for shape in shapes(sync.read(path)) for letter in re.findall(r"\b[A-Z]\b", shape)}
    assert used <= BOOK.keys(), f"chapter 0 does not explain {sorted(used - BOOK.keys())}"
