// What the pages of the book do by themselves. Without it they can be read all the same.

// A moving picture: a still, and a button that puts the animation in its place and back.
function addPlayer(figure) {
  const picture = figure.querySelector("img");
  const still = picture.src;
  const button = document.createElement("button");
  button.type = "button";
  function set(moving) {
    picture.src = moving ? figure.dataset.animation : still;
    button.textContent = moving ? "\u25a0 Stop" : "\u25b6 Play";
    button.setAttribute("aria-pressed", moving);
  }
  button.addEventListener("click", () => set(picture.src === still));
  window.addEventListener("beforeprint", () => set(false));
  set(false);
  figure.append(button);
}

// Each line of code in a box of its own, which knows how far in it begins.
function setLines(pre) {
  const lines = pre.innerHTML.replace(/\n$/, "").split("\n");
  const count = (line, tag) => line.split(tag).length;
  if (lines.some((line) => count(line, "<span") !== count(line, "</span>"))) return;
  pre.replaceChildren(...lines.map((html) => {
    const line = document.createElement("span");
    line.className = "line";
    line.innerHTML = `${html}\n`;
    const blank = line.textContent.match(/^ */)[0].length;
    line.style.setProperty("--in", `${blank}ch`);
    const walk = document.createTreeWalker(line, NodeFilter.SHOW_TEXT);
    if (blank && walk.nextNode().length >= blank) {
      walk.currentNode.splitText(blank);
      const box = document.createElement("span");
      box.className = "blank";
      walk.currentNode.replaceWith(box);
      box.append(walk.currentNode);
    }
    return line;
  }));
  pre.classList.add("lines");
}

// No line begins with the comma after a formula.
function keepTogether(formula) {
  const next = formula.nextSibling;
  const marks = next?.nodeType === Node.TEXT_NODE && next.data.match(/^[,.;:!?)”’]+/);
  if (!marks) return;
  next.splitText(marks[0].length);
  const box = document.createElement("span");
  box.className = "together";
  formula.replaceWith(box);
  box.append(formula, next);
}

// A link into something folded unfolds it.
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at; at = at.parentElement?.closest("details")) {
    if (at.tagName === "DETAILS") at.open = true;
  }
  if (target) target.scrollIntoView();
}

// What has to be scrolled can be reached with the keyboard.
const SCROLLS = "div.math, .pst-scrollable-table-container, .output.text_html";
function reach() {
  for (const box of document.querySelectorAll(SCROLLS)) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("figure.player").forEach(addPlayer);
  document.querySelectorAll(".bd-article .highlight pre").forEach(setLines);
  document.querySelectorAll(".bd-article span.math").forEach(keepTogether);
  for (const code of document.querySelectorAll(".bd-article :not(pre) > code")) {
    code.classList.toggle("short", code.textContent.length <= 16);
  }
  window.addEventListener("hashchange", unfold);
  const watch = new ResizeObserver(reach);
  document.querySelectorAll(`article, ${SCROLLS}`).forEach((box) => watch.observe(box));
  if (location.hash) unfold();
});
