"""What the book links by itself, and the bibliography: every cited work and no other."""

import re
import sys

import pytest
import sync
from docutils import nodes
from docutils.utils import new_document

sys.path.append(str(sync.ROOT / "book/_ext"))
import linking  # noqa: E402

ENTRIES = linking.works(sync.ROOT / "book/references.bib")
GLOSSARY = sync.read(sync.ROOT / "book/glossary.md")


def test_every_cited_work_and_no_other():
    """A work is missing: add it to book/references.bib. One is too much: no page cites it."""
    where = linking.citations(sync.ROOT, ENTRIES)
    cited = {key: page for page, keys in where.items() for key in keys}
    missing = {key: page for key, page in cited.items() if key not in ENTRIES}
    assert not missing
    assert not set(ENTRIES) - set(cited)


def test_each_work_has_what_its_entry_says():
    urls = [entry.fields["url"] for entry in ENTRIES.values()]
    assert len(set(urls)) == len(urls)
    for key, entry in ENTRIES.items():
        names, year = linking.label(entry)
        assert linking.WORK.fullmatch(entry.fields["url"]), key
        assert key.startswith(entry.persons["author"][0].last_names[0].replace("-", "").lower())
        assert year in key and entry.fields["title"] and names


def test_the_glossary_is_in_alphabetical_order():
    terms = [term.lower() for term in re.findall(r"^(\S.*)\n  ", GLOSSARY, re.MULTILINE)]
    assert len(terms) > 30 and terms == sorted(terms)


def test_a_citation_is_found_by_key_and_by_address():
    text = (
        "{cite:p}`a2020x, b` and [c](https://arxiv.org/abs/1), again {cite:t}`b`,"
        " not [that](https://github.com/x/y), but https://doi.org/10.1/z"
    )
    assert linking.cited(text, {"https://arxiv.org/abs/1": "c"}) == [
        "a2020x", "b", "c", "https://doi.org/10.1/z"
    ]  # fmt: skip


def test_how_a_work_is_named():
    found = [linking.label(ENTRIES[key])[0] for key in ("elman1990finding", "milakov2018online")]
    assert found == ["Elman", "Milakov and Gimelshein"]
    assert linking.label(ENTRIES["dai2019transformer"]) == ("Dai et al.", "2019")
    assert "Łukasz Kaiser" in linking.authors(ENTRIES["vaswani2017attention"])


def test_the_bibliography_names_each_work_once():
    page = linking.write_bibliography(sync.ROOT, ENTRIES)
    for key, entry in ENTRIES.items():
        assert page.count(f"({key})=") == page.count(f"({entry.fields['url']})") == 1
    assert "\n\n## 1. Transformer-XL" in page
    assert "Also cited in: [Chapter 1](../notebooks/01_transformer_xl.ipynb)" in page


def test_the_code_page_shows_what_the_chapters_take_apart():
    page = linking.write_code(sync.ROOT)
    for name in sync.notebooks():
        for module in sync.chapter_modules(sync.ROOT, name):
            assert page.count(f"../memtx_minimal/{module.name}\n") == 1
    assert (sync.ROOT / "book/code.md").is_file()


def test_terms_and_their_plurals():
    forms = linking.terms(GLOSSARY)
    assert forms["hash bucket"] == forms["hash buckets"] == "hash bucket"
    assert forms["queries"] == "key, query, value" and forms["recl"] == "RECL"
    assert not linking.COMMON & set(forms)


@pytest.fixture
def tree():
    """A title, a code, a link and a sentence."""
    tree = new_document("page")
    tree += nodes.section("", nodes.title("", "A memory"))
    link = nodes.reference("", "memory", refuri="x")
    words = "A memory, memories, no in-memory; feedback memory."
    tree[0] += nodes.paragraph("", "", nodes.literal("", "memory"), link, nodes.Text(words))
    return tree


def test_a_term_is_linked_where_it_is_first_used(tree):
    class App:
        terms = linking.terms(GLOSSARY)

    linking.link_terms(App, tree, "page")
    links = list(tree.findall(linking.addnodes.pending_xref))
    assert [link.astext() for link in links] == ["memory", "feedback memory"]
    assert tree[0][1].astext().endswith("A memory, memories, no in-memory; feedback memory.")


@pytest.mark.parametrize(
    "text, groups",
    [
        ("see chapter 3.", ("3", None, None)),
        ("Appendix A", (None, "A", None)),
        ("In section 0.8, a", (None, None, "0.8")),
        ("section A.2", (None, None, "A.2")),
        ("chapters 0 to 4", None),
        ("chapter 12", None),
    ],
)
def test_places_that_a_text_names(text, groups):
    match = linking.PLACE.search(text)
    assert (match and match.groups()) == groups


def test_an_exercise_leads_to_its_solution():
    tree = new_document("page")
    bold = ["1.1 Who sees what", "A.2 Two lines", "Why"]
    empty = nodes.Text("")  # as MyST has it
    paragraphs = [nodes.paragraph("", "", empty, nodes.strong("", words)) for words in bold]
    tree += nodes.section("", nodes.title("", "1.8 Exercises"), *paragraphs)
    linking.link_solutions(tree, "solutions/01.html")
    links = [link["refuri"] for link in tree.findall(nodes.reference)]
    assert links == ["solutions/01.html#who-sees-what", "solutions/01.html#a-2-two-lines"]
