"""The works that came of the four papers: one sentence each, the same wherever it stands."""

import ast
import re

import pytest
import sync

FOLDER = sync.ROOT / "notebooks"
CHAPTERS = sorted(FOLDER.glob("0[1-4]_*.py"))
TODAY = FOLDER / "06_memory_today.py"


def prose(path):
    """The Markdown of a notebook's .py file, without the comment signs."""
    cells = re.split(r"(?m)^# %%", sync.read(path))
    cells = [cell.partition("\n")[2] for cell in cells if cell.startswith(" [markdown]")]
    return "\n\n".join(re.sub(r"(?m)^# ?", "", cell) for cell in cells)


def bullets(text):
    """The items of the lists in a Markdown text, each on one line."""
    items = re.findall(r"(?m)^- .+(?:\n(?!- )\S.*|\n +\S.*)*", text)
    return [" ".join(item.split()) for item in items]


def became(path):
    """The items of a chapter's section "What became of it"."""
    return bullets(re.search(r"(?ms)^## \S+ What became of it\n(.*?)(?=^## )", prose(path))[1])


def tree(path):
    """The names in the family tree of chapter 6, its ancestors and its works."""
    code = "\n".join(line for line in sync.read(path).splitlines() if line[:1] not in "#%!")
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(code).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("ANCESTORS", "TREE")
    }
    return [*values["ANCESTORS"], *(name for name, *_ in values["TREE"])]


@pytest.fixture
def today():
    if not TODAY.is_file():
        pytest.skip("chapter 6 is not there yet")
    return TODAY


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem[:2])
def test_each_chapter_names_some_works(path):
    """At most seven, each linked, with its year and one sentence."""
    items = became(path)
    assert 3 <= len(items) <= 7
    for item in items:
        assert re.match(r"- (The )?\[[^\]]+\]\(https://arxiv\.org/abs/\S+\) \(20\d\d\)", item), item
        assert item.endswith(".") and ". " not in item, item


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem[:2])
def test_chapter_6_says_the_same(path, today):
    assert not set(became(path)) - set(bullets(prose(today)))


def test_each_name_of_the_tree_is_linked(today):
    names = tree(today)
    assert len(set(names)) == len(names)
    assert not set(names) - set(re.findall(r"\[([^\]]+)\]\(https?://", prose(today)))
