"""Check the built book: python tests/check_pages.py book/_build/html

Links and anchors lead somewhere, nothing is loaded from another host, every picture has its alt text, and no markup shows
through. A link that a reader may click is free to lead to another site; whether it does is not checked, since no page needs it.
"""

import functools
import re
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "embed": "src", "object": "data"}
QUIET_RELS = {"canonical", "next", "prev", "author", "license", "alternate"}  # <link>s that a browser does not load
IN_CSS = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""")
IN_SCRIPT = re.compile(r"""(?:(?:fetch|import|importScripts)\(|\bfrom\b|\.(?:src|href)\s*=)\s*["'`]((?:https?:)?//[^"'`]+)""")
RESIDUE = re.compile(r"\{[a-z:-]+\}`|^(?:```|:::)\{?\w|\{(?:bibliography|glossary)\}", re.M)


@functools.cache
def parse(page):
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


@functools.cache
def anchors(page):
    return {tag.get("id") or tag.get("name") for tag in parse(page).find_all(lambda tag: tag.has_attr("id") or tag.name == "a")}


def elsewhere(url):
    return urlsplit(url).netloc != "" or urlsplit(url).scheme in ("http", "https")


def missing(page, url):
    """What keeps a local address from leading somewhere, if anything does."""
    parts = urlsplit(url)
    if parts.scheme:  # data:, mailto:, javascript:
        return "" if parts.scheme != "file" else "leads to this machine"
    target = page if not parts.path else (page.parent / unquote(parts.path)).resolve()
    if not target.is_file():
        return "leads to no file"
    if parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in anchors(target):
        return "leads to no such anchor"
    return ""


def check_links(page, soup, count):
    for tag in soup.find_all("a", href=True):
        count["links"] += 1
        if tag["href"] != "#" and not elsewhere(tag["href"]) and (why := missing(page, tag["href"])):
            yield f"the link {tag['href']} {why}"
    for tag in soup.find_all("meta", attrs={"http-equiv": re.compile("^refresh$", re.I)}):
        url = tag["content"].partition("url=")[2]
        if why := missing(page, url):
            yield f"the redirection to {url} {why}"


def loads(soup):
    """Every address that the page's elements load by themselves."""
    for name, attribute in LOADS.items():
        yield from (tag[attribute] for tag in soup.find_all(name) if tag.get(attribute))
    for tag in soup.find_all(["img", "source"], srcset=True):
        yield from (part.split()[0] for part in tag["srcset"].split(","))
    for tag in soup.find_all("link", href=True):
        rels = set(tag.get("rel", []))
        if not rels & QUIET_RELS:
            yield tag["href"]


def check_loads(page, soup, count):
    for url in loads(soup):
        count["loads"] += 1
        if elsewhere(url):
            yield f"loads {url}"
        elif why := missing(page, url):
            yield f"loads {url}, which {why}"
    css = [tag.get_text() for tag in soup.find_all("style")] + [tag["style"] for tag in soup.find_all(style=True)]
    for url in IN_CSS.findall("\n".join(css)):
        yield f"loads {url} in a style"
    for tag in soup.find_all("script", src=False):
        for url in re.findall(r"""(?:https?:)?//[\w.-]+\.\w+/[^"'`\s]*""", tag.get_text()):
            yield f"names {url} in an inline script"


def check_pictures(page, soup, count):
    for tag in soup.find_all("img"):
        count["pictures"] += 1
        if not tag.get("alt", "").strip():
            yield f"the picture {tag.get('src', '')[:80]} has no alt text"


def check_residue(page, soup, count):
    for tag in soup.find_all(class_=["problematic", "system-message"]):
        yield f"shows an error of the renderer: {tag.get_text()[:80]!r}"
    article = soup.find("article") or soup
    for text in article.find_all(string=RESIDUE):
        if not text.find_parent(["pre", "code", "script", "style"]):
            yield f"shows markup: {text.strip()[:80]!r}"


def check_assets(root):
    """Style sheets and scripts beside the pages."""
    for path in sorted(root.rglob("*")):
        pattern = {".css": IN_CSS, ".js": IN_SCRIPT}.get(path.suffix)
        if pattern:
            for url in pattern.findall(path.read_text(encoding="utf-8", errors="replace")):
                yield f"{path.relative_to(root)}: loads {url}"


def check(root):
    """(problems, counts) of all the pages under a folder."""
    root, count, problems = Path(root).resolve(), Counter(), []
    pages = [page for page in sorted(root.rglob("*.html")) if "_static" not in page.parts]
    for page in pages:
        for one in (check_links, check_loads, check_pictures, check_residue):
            problems += [f"{page.relative_to(root)}: {problem}" for problem in one(page, parse(page), count)]
    if not pages:
        problems.append(f"no pages in {root}")
    return problems + list(check_assets(root)), Counter(pages=len(pages)) + count


def main(root):
    problems, count = check(root)
    sys.stdout.reconfigure(errors="backslashreplace")  # a page may quote any letter
    for problem in problems:
        print(problem)
    print(", ".join(f"{n} {what}" for what, n in count.items()) + f": {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
