// The contact sheet: only cards in view are in the document, and thumbnails stand as text in the
// page until a card shows them.
const data = JSON.parse(document.getElementById("data").textContent);
const CARD_WIDTH = 214, CARD_HEIGHT = 334, GAP = 12, AHEAD = 2;
const sheet = document.getElementById("sheet");
const search = document.getElementById("search");
const order = document.getElementById("order");
const detail = document.getElementById("detail");
const BAD = data.bad;
const folded = data.pictures.map((p) => `${p.path}\n${p.caption ?? ""}`.toLowerCase());

// ---- thumbnails ----
const chunks = new Map();
const waiting = new Set();
function thumbnail(number) {
  const place = Math.floor(number / data.chunk);
  if (!chunks.has(place)) {
    const element = document.getElementById(`thumbnails-${place}`);
    // While the page still loads, what stands further down is not there yet.
    if (!element) return null;
    if (chunks.size > 40) chunks.delete(chunks.keys().next().value);
    chunks.set(place, element.textContent.split("\n"));
  }
  return chunks.get(place)[number % data.chunk];
}
function show(frame, number) {
  const encoded = thumbnail(number);
  if (encoded === null) {
    waiting.add(frame);
    frame.dataset.number = number;
  } else if (encoded) {
    const image = new Image();
    image.decoding = "async";
    image.alt = "";
    image.src = `data:image/webp;base64,${encoded}`;
    frame.replaceChildren(image);
  } else {
    frame.textContent = data.pictures[number].unreadable ? "cannot be opened" : "no thumbnail";
  }
}
document.addEventListener("DOMContentLoaded", () => {
  for (const frame of waiting) show(frame, Number(frame.dataset.number));
  waiting.clear();
});

// ---- which pictures, in what order ----
let filter = "all", shown = [], term = "";
function select() {
  term = search.value.trim().toLowerCase();
  const pool = filter === "all" ? data.pictures.map((_, n) => n) : data.filters[filter];
  shown = term ? pool.filter((n) => folded[n].includes(term)) : pool.slice();
  const length = (n) => data.pictures[n].words ?? -1;
  if (order.value === "short") shown.sort((a, b) => length(a) - length(b));
  if (order.value === "long") shown.sort((a, b) => length(b) - length(a));
  document.getElementById("count").textContent =
    `${shown.length.toLocaleString("en")} of ${data.pictures.length.toLocaleString("en")}`;
  cards.forEach((card) => card.remove());
  cards.clear();
  draw();
}
for (const button of document.querySelectorAll("[data-filter]"))
  button.addEventListener("click", () => {
    filter = button.dataset.filter;
    for (const other of document.querySelectorAll("[data-filter]"))
      other.setAttribute("aria-pressed", String(other === button));
    select();
    if (sheet.getBoundingClientRect().top < 0) sheet.scrollIntoView();
  });
for (const button of document.querySelectorAll("[data-word]"))
  button.addEventListener("click", () => {
    search.value = button.dataset.word;
    select();
    document.querySelector(".tools").scrollIntoView();
  });
let typing = 0;
search.addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(select, 120);
});
order.addEventListener("change", select);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== search) {
    event.preventDefault();
    search.focus();
  }
});

// ---- cards ----
const cards = new Map();
function draw() {
  const columns = Math.max(1, Math.floor((sheet.clientWidth + GAP) / (CARD_WIDTH + GAP)));
  const width = Math.floor((sheet.clientWidth + GAP) / columns - GAP);
  const rows = Math.ceil(shown.length / columns);
  sheet.style.height = `${Math.max(120, rows * (CARD_HEIGHT + GAP))}px`;
  const top = -sheet.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor(top / (CARD_HEIGHT + GAP)) - AHEAD);
  const last = Math.ceil((top + innerHeight) / (CARD_HEIGHT + GAP)) + AHEAD;
  const from = first * columns, to = Math.min(shown.length, Math.max(0, last) * columns);
  for (const [place, card] of cards)
    if (place < from || place >= to) {
      card.remove();
      cards.delete(place);
      waiting.delete(card.querySelector(".frame"));
    }
  for (let place = from; place < to; place++) {
    let card = cards.get(place);
    if (!card) {
      card = made(shown[place], place);
      cards.set(place, card);
      sheet.append(card);
    }
    card.style.width = `${width}px`;
    card.style.height = `${CARD_HEIGHT}px`;
    card.style.transform = `translate(${(place % columns) * (width + GAP)}px, ${
      Math.floor(place / columns) * (CARD_HEIGHT + GAP)}px)`;
  }
  sheet.classList.toggle("nothing", !shown.length);
  if (!shown.length) sheet.textContent = "No picture is like this.";
  else if (sheet.firstChild?.nodeType === Node.TEXT_NODE) sheet.firstChild.remove();
}
function made(number, place) {
  const picture = data.pictures[number];
  const card = document.createElement("button");
  card.type = "button";
  card.className = "card";
  if (picture.notes) card.classList.add(picture.kinds & BAD ? "bad" : "doubt");
  const frame = element("div", "frame", "");
  const name = element("div", "name", "");
  name.append(element("bdi", "", picture.path));
  name.title = picture.path;
  card.append(frame, name, caption(picture));
  if (picture.notes) card.append(element("div", "note", picture.notes[0]));
  show(frame, number);
  card.addEventListener("click", () => open(place));
  return card;
}
function caption(picture) {
  const text = element("div", "text", "");
  const said = picture.caption ?? "";
  const at = term ? said.toLowerCase().indexOf(term) : -1;
  if (at < 0) text.textContent = said;
  else text.append(said.slice(0, at), element("mark", "", said.slice(at, at + term.length)), said.slice(at + term.length));
  return text;
}
function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.textContent = text;
  return made;
}
let queued = false;
function later() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    draw();
  });
}
addEventListener("scroll", later, { passive: true });
addEventListener("resize", later);

// ---- one picture ----
function open(place) {
  const picture = data.pictures[shown[place]];
  const steps = element("div", "steps", "");
  steps.append(element("span", "", picture.path));
  for (const [text, by] of [["Previous", -1], ["Next", 1]]) {
    const step = element("button", "", text);
    step.disabled = !(place + by in shown);
    step.addEventListener("click", () => open(place + by));
    steps.append(step);
  }
  const close = element("button", "", "Close");
  close.addEventListener("click", () => detail.close());
  steps.append(close);
  const body = element("div", "detail", "");
  const frame = element("div", "", "");
  show(frame, shown[place]);
  const side = element("div", "", "");
  if (picture.notes) {
    const notes = element("ul", "notes", "");
    for (const note of picture.notes) notes.append(element("li", "", note));
    side.append(notes);
  }
  side.append(element("p", "", picture.caption ?? "No caption."));
  const facts = document.createElement("dl");
  for (const [key, value] of Object.entries(picture.facts ?? {}))
    facts.append(element("dt", "", key), element("dd", "", String(value)));
  side.append(facts);
  const left = element("div", "", "");
  left.append(frame);
  if (picture.link) {
    const link = element("a", "", "Open the picture");
    link.href = picture.link;
    link.target = "_blank";
    left.append(link);
  }
  body.append(left, side);
  detail.replaceChildren(steps, body);
  detail.onkeydown = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by && place + by in shown) open(place + by);
  };
  if (!detail.open) detail.showModal();
}
detail.addEventListener("click", (event) => event.target === detail && detail.close());

select();
