// The search page. SECTIONS, from sections.js: [address, page, heading, text] of each section.

const AROUND = 90; // letters of an excerpt to each side of what was found
const MOST = 50; // results that are shown

// Sections that hold every word, those with the words in their heading first.
function find(query, sections) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const found = [];
  for (const [address, page, heading, text] of sections) {
    const head = heading.toLowerCase(), all = `${head} ${page} ${text}`.toLowerCase();
    if (!words.every((word) => all.includes(word))) continue;
    let score = 0;
    for (const word of words) {
      score += 20 * head.includes(word) + Math.min(10, text.toLowerCase().split(word).length - 1);
    }
    found.push({ address, page, heading, text, words, score });
  }
  return found.sort((a, b) => b.score - a.score);
}

// The text around the first word that it holds, as nodes; what was looked for is marked.
function excerpt({ text, words }) {
  const low = text.toLowerCase();
  const at = Math.min(...words.map((word) => low.indexOf(word)).filter((i) => i >= 0), text.length);
  const from = at === text.length ? 0 : low.lastIndexOf(" ", Math.max(0, at - AROUND)) + 1;
  const shown = text.slice(from, from + 2 * AROUND + 20);
  const p = document.createElement("p");
  const pattern = new RegExp(`(${words.map((w) => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "i");
  if (from) p.append("… ");
  for (const part of shown.split(pattern)) {
    const node = document.createElement(words.includes(part.toLowerCase()) ? "mark" : "span");
    node.textContent = part;
    p.append(node);
  }
  if (from + shown.length < text.length) p.append(" …");
  return p;
}

function show(query) {
  const results = document.getElementById("search-results");
  const found = find(query, SECTIONS);
  const count = document.createElement("p");
  count.setAttribute("role", "status");
  const shown = found.length > MOST ? `, the first ${MOST} are shown` : "";
  count.textContent = query ? `${found.length || "No"} ${found.length === 1 ? "section" : "sections"} with “${query}”${shown}.` : "";
  const list = document.createElement("ul");
  for (const one of found.slice(0, MOST)) {
    const item = document.createElement("li"), link = document.createElement("a");
    link.href = one.address;
    link.textContent = one.heading;
    item.append(link);
    if (one.heading !== one.page) item.append(` in ${one.page}`);
    item.append(excerpt(one));
    list.append(item);
  }
  results.replaceChildren(count, list);
}

const asked = new URLSearchParams(location.search).get("q")?.trim() ?? "";
const field = document.querySelector(".bd-search-container input[type=search]");
field.value = asked;
document.querySelectorAll(".search-button__wrapper input").forEach((input) => (input.value = asked));
show(asked);
