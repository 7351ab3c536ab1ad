"""What a page may not do, one function each: it returns the faults that it finds.

test_faults.py commits each fault once and sees it found.
"""

from pathlib import Path

AXE = "axe.min.js"

WIDE = """() => {
  const faults = [], seen = (what, el) =>
    faults.push(`${what}: ${(el.textContent || el.alt || el.outerHTML).trim().slice(0, 60)}`);
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) faults.push(`the page: ${root.scrollWidth} px`);
  const article = document.querySelector("article");
  if (!article) return faults;
  for (const box of [article, article.parentElement])
    if (box.scrollWidth > box.clientWidth + 1) faults.push(`the text: ${box.scrollWidth} px`);
  const scrolls = ".pst-scrollable-table-container, .output.text_html";
  const right = article.getBoundingClientRect().right + 1;
  for (const el of article.querySelectorAll("pre, table, img, p, li, button, mjx-container > svg")) {
    const box = el.getBoundingClientRect();
    if (el.matches("pre") && el.scrollWidth > el.clientWidth + 1) seen("code", el);
    else if (box.right > right && !el.closest(scrolls)) seen(el.tagName, el);
  }
  for (const box of article.querySelectorAll(scrolls))
    if (box.scrollWidth > box.clientWidth + 1)
      for (const el of box.querySelectorAll("tr, th, td"))
        if (getComputedStyle(el).backgroundColor.startsWith("rgb(")) seen("hides that more follows", el);
  for (const el of article.querySelectorAll("div.math"))
    if (el.scrollWidth > el.clientWidth + 1) seen("equation", el);
  return faults;
}"""

# What wraps of a line of code does not stand to the left of where the line begins.
OUTDENTED = """() => [...document.querySelectorAll(".bd-article .highlight pre")].flatMap((pre) =>
  [...pre.querySelectorAll(".line")].filter((line) => {
    const words = document.createRange(), blank = line.querySelector(".blank");
    words.selectNodeContents(line);
    if (blank) words.setStartAfter(blank);
    const boxes = [...words.getClientRects()].filter((box) => box.width > 1);
    return boxes.some((box) => box.top > boxes[0].bottom - 2 && box.left < boxes[0].left + 2);
  }).map((line) => line.textContent).concat(pre.querySelector(".line") ? [] : [pre.textContent]))"""

COVERED = """() => {
  const box = (element) => element.getBoundingClientRect(), found = [];
  for (const player of document.querySelectorAll("figure.player")) {
    const button = box(player.querySelector("button"));
    if (button.top < box(player.querySelector("img")).bottom) found.push("a button on a picture");
  }
  for (const icon of document.querySelectorAll(".prev-next-footer svg.icon")) {
    if (box(icon).width < 8) found.push("a squeezed arrow");
  }
  return found;
}"""

# 88 columns of code fit: what is not longer does not wrap.
WRAPS = """() => {
  const style = document.createElement("style");
  style.textContent = "article pre { white-space: pre !important }";
  document.head.append(style);
  const faults = [];
  for (const pre of document.querySelectorAll("article pre")) {
    const longest = Math.max(...pre.textContent.split("\\n").map((line) => line.length));
    if (longest <= 88 && pre.scrollWidth > pre.clientWidth + 1)
      faults.push(`${longest} columns wrap: ${pre.textContent.trim().slice(0, 60)}`);
  }
  style.remove();
  return faults;
}"""

EQUATIONS = """async () => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  const faults = [];
  for (const bad of document.querySelectorAll("mjx-merror, [data-mjx-error]"))
    faults.push(bad.title || bad.dataset.mjxError || bad.textContent);
  for (const span of document.querySelectorAll("span.math, div.math"))
    if (!span.querySelector("mjx-container")) faults.push(`not set: ${span.textContent.slice(0, 60)}`);
  return faults;
}"""

# Shrunk to less than 0.8, the letters of an equation are too small to be read.
SMALL = """() => {
  const faults = [];
  for (const svg of document.querySelectorAll("div.math svg")) {
    const now = svg.getBoundingClientRect().width;
    svg.style.maxWidth = "none";
    const full = svg.getBoundingClientRect().width;
    svg.style.maxWidth = "";
    if (now < 0.8 * full)
      faults.push(`${now / full} of its size: ${svg.parentElement.textContent.slice(0, 60)}`);
  }
  return faults;
}"""

# A line that begins with a year or another number and a full stop is taken for a list.
LISTS = """() => [...document.querySelectorAll("article ol[start]")]
  .filter((list) => list.start > 20).map((list) => `${list.start}. ${list.textContent.slice(0, 60)}`)"""

MOVES = """() => [...document.querySelectorAll("article img")]
  .filter((img) => /\\.gif$|^data:image\\/gif/.test(img.src)).map((img) => img.src.slice(-60))"""

# Axe does not judge what has a gradient behind it. A gradient of ours has the colour under it.
FAINT = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (v) => (v <= 10 ? v / 3295 : ((v / 255 + 0.055) / 1.055) ** 2.4);
    const [red, green, blue] = numbers(colour).map(linear);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const under = (el) => {
    const colour = getComputedStyle(el).backgroundColor;
    return (numbers(colour)[3] ?? 1) < 0.5 ? under(el.parentElement) : colour;
  };
  const faults = [];
  for (const el of document.querySelectorAll("article :is(caption, td, th, p, li), #pst-back-to-top")) {
    const [dark, bright] = [getComputedStyle(el).color, under(el)].map(light).sort((a, b) => a - b);
    if (bright + 0.05 < 4.5 * (dark + 0.05)) faults.push(`faint: ${el.textContent.trim().slice(0, 60)}`);
  }
  return faults;
}"""

PICTURES = """() => [...document.images].filter((img) => !img.complete || !img.naturalWidth)
  .map((img) => `not loaded: ${img.src.slice(-60)}`)"""

# On paper nothing is folded, scrolls or leads to a button.
PRINT = """() => {
  const faults = [];
  const shown = (el) => el.getClientRects().length > 0 && el.checkVisibility();
  for (const el of document.querySelectorAll("article details.hide, article button, .parts"))
    if (shown(el)) faults.push(`an empty frame: ${el.textContent.trim().slice(0, 60)}`);
  for (const el of document.querySelectorAll("article details:not(.hide) > :not(summary)"))
    if (el.textContent.trim() && !shown(el)) faults.push(`folded: ${el.textContent.slice(0, 60)}`);
  for (const el of document.querySelectorAll("article pre, article .output, div.math, article table")) {
    const style = getComputedStyle(el);
    if (el.scrollWidth > el.clientWidth + 1 && style.overflowX !== "visible")
      faults.push(`clipped: ${el.textContent.trim().slice(0, 60)}`);
    if (el.getBoundingClientRect().right > innerWidth + 1)
      faults.push(`beyond the paper: ${el.textContent.trim().slice(0, 60)}`);
  }
  return faults;
}"""

# Axe compares colours with what lies behind each element: one of each kind in code is enough.
THIN = """() => {
  const seen = new Set();
  for (const span of document.querySelectorAll("article pre span[class]")) {
    const kind = span.className + !!span.closest(".cell_output");
    if (seen.has(kind)) span.replaceWith(...span.childNodes);
    seen.add(kind);
  }
}"""

RUN_AXE = """() => axe.run({ exclude: ["mjx-container"] }, { resultTypes: ["violations"], preload: false })
  .then((found) => found.violations.flatMap((fault) => fault.nodes.map(
    (node) => `${fault.id} (${fault.impact}): ${node.html.slice(0, 160)}`)))"""


def watch(page):
    """A list to which is added whatever goes wrong on a page."""
    faults = []
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on(
        "console",
        lambda said: said.type in ("error", "warning")
        and faults.append(f"{said.type}: {said.text} {said.location.get('url', '')}"),
    )
    page.on(  # what the page itself gave up, since it was left, has not failed
        "requestfailed",
        lambda r: "ERR_ABORTED" in r.failure or faults.append(f"failed: {r.url} {r.failure}"),
    )
    page.on(
        "response",
        lambda r: r.status >= 400 and faults.append(f"status {r.status}: {r.url}"),
    )
    return faults


def wide(page):
    return page.evaluate(WIDE)


def wraps(page):
    return page.evaluate(WRAPS)


def equations(page):
    return page.evaluate(EQUATIONS)


def outdented(page):
    """Lines of code of which what wraps stands to the left of where they begin."""
    return page.evaluate(OUTDENTED)


def covered(page):
    """Buttons of players that lie on their picture, arrows to other pages that are
    squeezed."""
    return page.evaluate(COVERED)


def small(page):
    return page.evaluate(SMALL)


def lists(page):
    return page.evaluate(LISTS)


def moves(page):
    return page.evaluate(MOVES)


def faint(page):
    return page.evaluate(FAINT)


def pictures(page):
    page.evaluate("document.querySelectorAll('img').forEach((img) => (img.loading = 'eager'))")
    page.wait_for_function("[...document.images].every((img) => img.complete)")
    return page.evaluate(PICTURES)


def clipped_in_print(page):
    """With the width that A4 leaves, as on paper."""
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 680, "height": 1000})
    faults = page.evaluate(PRINT)
    page.emulate_media(media="screen")
    return faults


def axe(page):
    """What axe-core finds. It runs offline: the package brings its script along."""
    import axe_playwright_python

    if not page.evaluate("!!window.axe"):
        script = Path(axe_playwright_python.__file__).with_name(AXE)
        page.evaluate(script.read_text(encoding="utf-8"))
        page.evaluate(THIN)
    return page.evaluate(RUN_AXE)


def set_size(page, width):
    page.set_viewport_size({"width": width, "height": 900})


def set_theme(page, theme):
    page.evaluate(
        "(theme) => { document.documentElement.dataset.theme = theme;"
        " document.documentElement.dataset.mode = theme; }",
        theme,
    )
