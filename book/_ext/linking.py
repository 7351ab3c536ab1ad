"""Sphinx extension: words lead to where they are explained.

In every page, without a mark in its text: a glossary term at its first use leads to the
glossary, the address of a paper to its entry in the bibliography, "chapter 3" and
"section 0.8" to the chapter and the section. A chapter says above its text where its
exercises, solutions and files are; an exercise leads to its solution.

The bibliography and the page of the code are written here: what is cited where, and which
files a chapter takes apart, is read from the pages themselves. {cite:p}`key` and
{cite:t}`key` name a work of references.bib, "(Elman, 1990)" and "Elman (1990)".
"""

import json
import re
import sys
from pathlib import Path

from docutils import nodes
from pybtex.database import parse_file
from pybtex.richtext import Text
from sphinx import addnodes
from sphinx.domains import Domain
from sphinx.util.nodes import make_refnode

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import sync  # noqa: E402

BIBLIOGRAPHY, GLOSSARY, CODE = "book/bibliography", "book/glossary", "book/code"
# An address on one of these is that of a work.
PUBLISHERS = r"arxiv\.org|doi\.org|openreview\.net|aclanthology\.org|proceedings\.\S+?"
WORK = re.compile(rf"https?://(?:www\.)?(?:{PUBLISHERS})/[^\s)>\]\"`]+")
CITE = re.compile(r"\{cite:[pt]\}`([^`]+)`")
SHARED = ["training", "inputs"]  # files of all chapters
COMMON = {"key", "value"}  # words of a term that mean something else in places


# ------------------------------------------------------------------ works


def works(path):
    """{key: entry} of a .bib file, in its order."""
    return dict(parse_file(str(path), bib_format="bibtex").entries)


def plain(text):
    return str(Text.from_latex(text))


def authors(entry):
    return [
        " ".join(plain(p) for p in [*a.first_names, *a.middle_names, *a.prelast_names, *a.last_names])
        for a in entry.persons["author"]
    ]  # fmt: skip


def label(entry):
    """As a text names it, ("Dai et al.", "2019")."""
    last = [plain(" ".join(a.prelast_names + a.last_names)) for a in entry.persons["author"]]
    names = last[0] if len(last) == 1 else " and ".join(last) if len(last) == 2 else f"{last[0]} et al."
    return names, entry.fields["year"]


def words(path):
    """The text of a page that people write: of a notebook, its Markdown."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def cited(text, urls):
    """The keys of the works that a text cites, in its order; an address that urls (address:
    key) lacks stands for itself."""
    found = {}
    for match in re.finditer(f"{CITE.pattern}|({WORK.pattern})", text):
        keys = match[1].split(",") if match[1] else [urls.get(match[2], match[2])]
        found.update((key.strip(), None) for key in keys)
    return list(found)


def pages(root):
    """{name: path} of the pages of a folder, the chapters first."""
    chapters = [root / "notebooks" / f"{name}.ipynb" for name in sync.notebooks(root)]
    others = sorted((root / "book").glob("*.md"))
    front = [root / "index.md"] if (root / "index.md").is_file() else []
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in [*chapters, *front, *others]}


def citations(root, entries):
    """{page: keys of the works that it cites}."""
    urls = {entry.fields["url"]: key for key, entry in entries.items()}
    return {page: keys for page, path in pages(root).items() if (keys := cited(words(path), urls))}


def title(path):
    return re.search(r"(?m)^# (.+)$", words(path))[1]


def short(path):
    """"Chapter 3" for the page of a chapter, "Appendix A", else its title."""
    number = re.match(r"(\d+|[A-Z])\. ", title(path))
    if not number:
        return title(path)
    return ("Chapter " if number[1].isdigit() else "Appendix ") + number[1]


def write_bibliography(root, entries):
    """Markdown: the works of references.bib by the first page that cites them."""
    where, lines, done = citations(root, entries), [], set()
    for page, path in pages(root).items():
        new = [key for key in where.get(page, []) if key in entries and key not in done]
        if new:
            lines += [f"## {title(path)}"]
        for key in new:
            entry = entries[key]
            year = entry.fields["year"]
            venue = plain(entry.fields.get("booktitle") or entry.fields.get("journal", "arXiv"))
            others = [p for p, keys in where.items() if key in keys and p != page]
            also = [f"[{short(pages(root)[p])}](../{pages(root)[p].relative_to(root)})" for p in others]
            lines += [
                f"({key})=",
                f"**[{plain(entry.fields['title'])}]({entry.fields['url']})**\\\n"
                f"{', '.join(authors(entry))}. {venue if year in venue else f'{venue}, {year}'}."
                + (f"\\\nAlso cited in: {', '.join(also)}." if also else ""),
            ]
        done.update(new)
    return "\n\n".join(lines)


# ------------------------------------------------------------------ the code


def write_code(root):
    """Markdown: the files that the chapters take apart, and those that all of them use."""
    lines = []
    for name in sync.notebooks(root):
        path = root / "notebooks" / f"{name}.ipynb"
        for module in sync.chapter_modules(root, name):
            lines += listing(module.stem, f"[{title(path)}](../notebooks/{path.name})")
    for module in SHARED:
        lines += listing(module, "all chapters")
    return "\n\n".join(lines)


def listing(module, chapter):
    return [
        f"## {module}.py",
        f"For {chapter}.",
        f"```{{literalinclude}} ../memtx_minimal/{module}.py\n:language: python\n```",
    ]


def fill_in(app, page, source):
    root = Path(app.srcdir)
    if page == BIBLIOGRAPHY:
        source[0] += "\n" + write_bibliography(root, app.works)
    elif page == CODE:
        source[0] += "\n" + write_code(root)


# ------------------------------------------------------------------ links


def prose(tree):
    """The texts of a page that are neither titles nor links nor code."""
    outside = (nodes.title, nodes.reference, nodes.literal, nodes.literal_block, nodes.raw, nodes.math,
               nodes.caption, nodes.comment, nodes.term, addnodes.pending_xref)  # fmt: skip
    for text in list(tree.findall(nodes.Text)):
        at = text.parent
        while at is not None and not isinstance(at, outside):
            at = at.parent
        if at is None:
            yield text


def split(text, pattern, link):
    """Replace in a text node what matches by link(match), where that is a node."""
    new, end = [], 0
    for match in pattern.finditer(text):
        if (node := link(match)) is not None:
            new += [nodes.Text(text[end : match.start()]), node]
            end = match.end()
    if new:
        text.parent.replace(text, [*new, nodes.Text(text[end:])])


def terms(glossary):
    """{what a text may say, in small letters: the term} of the glossary's Markdown."""
    block = re.search(r"```\{glossary\}\n(.*?)\n```", glossary, re.S)[1]
    forms = {}
    for term in re.findall(r"(?m)^\S.*$", block):
        for word in set(term.split(", ")) - COMMON:
            for plural in (word, word + "s", re.sub("y$", "ies", word)):
                forms[plural.lower()] = term
    return forms


def link_terms(app, tree, page):
    """The first use of each term of the glossary."""
    forms, seen = app.terms, set()
    longest = sorted(forms, key=len, reverse=True)
    pattern = re.compile(rf"(?i)(?<![\w-])({'|'.join(map(re.escape, longest))})(?![\w-])")

    def link(match):
        term = forms[match[0].lower()]
        if term in seen:
            return None
        seen.add(term)
        node = addnodes.pending_xref(
            "", nodes.inline(match[0], match[0], classes=["std-term"]),
            refdomain="std", reftype="term", reftarget=term, refexplicit=True, refwarn=True,
            refdoc=page, classes=["term"],
        )  # fmt: skip
        return node

    for text in prose(tree):
        split(text, pattern, link)


def link_work(key, text, page):
    return addnodes.pending_xref(
        "", nodes.inline(text, text), refdomain="std", reftype="ref", reftarget=key.lower(),
        refexplicit=True, refwarn=True, refdoc=page,
    )  # fmt: skip


def link_works(app, tree, page):
    """Addresses of works lead to the bibliography; in the References, to the work."""
    urls = {entry.fields["url"]: key for key, entry in app.works.items()}
    for link in list(tree.findall(nodes.reference)):
        section = link
        while section is not None and not isinstance(section, nodes.section):
            section = section.parent
        heading = section.next_node(nodes.title).astext() if section is not None else ""
        if link.get("refuri") in urls and not heading.endswith("References"):
            link.replace_self(link_work(urls[link["refuri"]], link.astext(), page))


def cite(name, rawtext, text, lineno, inliner, options=None, content=None):
    """The roles cite:p, "(Elman, 1990)", and cite:t, "Elman (1990)"."""
    env = inliner.document.settings.env
    links = []
    for key in (part.strip() for part in text.split(",")):
        if key not in env.app.works:
            return [], [inliner.reporter.error(f"no work {key!r} in references.bib", line=lineno)]
        names, year = label(env.app.works[key])
        shown = f"{names}, {year}" if name == "cite:p" else f"{names} ({year})"
        links += [nodes.Text("; "), link_work(key, shown, env.docname)]
    around = ("(", ")") if name == "cite:p" else ("", "")
    return [nodes.Text(around[0]), *links[1:], nodes.Text(around[1])], []


class Cite(Domain):
    name, label = "cite", "works"
    roles = {"p": cite, "t": cite}

    def merge_domaindata(self, docnames, otherdata):
        pass


def exercises(tree):
    """The paragraphs with which exercises begin, and their number and title, in bold."""
    for section in tree.findall(nodes.section):
        if section.next_node(nodes.title).astext().endswith("Exercises"):
            for child in section.children:
                bold = isinstance(child, nodes.paragraph) and child.next_node(nodes.strong)
                if bold and re.match(r"(\d|[A-Z])\.\d", child.astext()):
                    yield child, bold.astext()


def link_solutions(tree, address):
    """Each exercise leads to the heading of the same words on the page of solutions."""
    for paragraph, words in exercises(tree):
        uri = f"{address}#{nodes.make_id(words)}"
        link = nodes.reference("", "Solution", internal=True, refuri=uri)
        paragraph += [nodes.Text(" "), nodes.inline("", "", link, classes=["solution"])]


def name_the_parts(app, tree, page):
    """Above a chapter: its exercises, solutions and files."""
    name = page.removeprefix("notebooks/")
    if page == name or name.startswith("solutions/"):
        return
    links = []
    for section in tree.findall(nodes.section):
        if section.next_node(nodes.title).astext().endswith("Exercises"):
            links.append(("exercises", f"#{section['ids'][0]}"))
    if (solutions := f"notebooks/solutions/{name}") in app.env.found_docs:
        address = app.builder.get_relative_uri(page, solutions)
        link_solutions(tree, address)
        links.append(("solutions", address))
    if CODE in app.env.found_docs:
        code = app.builder.get_relative_uri(page, CODE)
        for module in sync.chapter_modules(Path(app.srcdir), name):
            links.append((module.name, f"{code}#{nodes.make_id(module.name)}"))
    line = nodes.paragraph(classes=["parts"])
    line += nodes.Text("In this chapter: ")
    for name, uri in links:
        line += [nodes.reference("", name, internal=True, refuri=uri), nodes.Text(" · ")]
    line.pop()
    top = tree.next_node(nodes.section)
    top.insert(1, line)


def before_resolving(app, tree):
    page = app.env.docname
    name_the_parts(app, tree, page)
    if page != BIBLIOGRAPHY:
        link_works(app, tree, page)
    if page not in (GLOSSARY, BIBLIOGRAPHY, CODE):
        link_terms(app, tree, page)


PLACE = re.compile(
    r"\b(?:[Cc]hapter (\d)\b(?!\.\d)|[Aa]ppendix ([A-Z])\b(?!\.\d)|[Ss]ection ((?:\d|[A-Z])\.\d+)\b)"
)


def places(env):
    """{"3": page of chapter 3, "0.8": its section 0.8, "A": an appendix}, as (page, id)."""
    found = {}
    for page, toc in env.tocs.items():
        for link in toc.findall(nodes.reference):
            number = re.match(r"(\d+|[A-Z])\. |((?:\d|[A-Z])\.\d+) ", link.astext())
            if number and page.startswith("notebooks/"):
                found.setdefault(number[1] or number[2], (page, link["anchorname"].lstrip("#")))
    return found


def link_places(app, tree, page):
    """"Chapter 3" and "section 0.8" in a text."""
    known = places(app.env)

    def link(match):
        target, anchor = known.get(match[1] or match[2] or match[3], (None, ""))
        if target is None or (target == page and not anchor):
            return None
        return make_refnode(app.builder, page, target, anchor, nodes.Text(match[0]))

    for text in prose(tree):
        split(text, PLACE, link)


def read_sources(app):
    app.works = works(HERE.parent / "references.bib")
    app.terms = terms((Path(app.srcdir) / f"{GLOSSARY}.md").read_text(encoding="utf-8"))


def setup(app):
    app.add_domain(Cite)
    app.connect("builder-inited", read_sources)
    app.connect("source-read", fill_in)
    app.connect("doctree-read", before_resolving)
    app.connect("doctree-resolved", link_places)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
