// Opens cells, sorts the table.

const states = new Map();

function decode(id) {
  const cell = JSON.parse(document.getElementById(id).textContent);
  for (const run of cell.runs) {
    for (const name of ["t_s", "itl_ms"]) run[name] = floats(run[name]);
    for (const gpu of run.gpus) {
      for (const name of ["t_s", "sm_clock_mhz", "power_w"]) gpu[name] = floats(gpu[name]);
    }
  }
  return cell;
}

function drawCell(host) {
  const id = host.dataset.charts;
  if (!states.has(id)) states.set(id, { id, cell: decode(id), warmup: false, view: null });
  const state = states.get(id);
  const { cell } = state;
  host.replaceChildren();
  liveTimeline(host, cell, state);
  slowRuns(host, cell.runs);
  distribution(host, cell);
  strip(host, cell);
  phases(host, cell.runs);
  runTable(host, cell.runs);
  hintScrolling();
}

/** Where a table is wider than the page it says so. */
function hintScrolling() {
  for (const box of document.querySelectorAll(".wide, .maps")) {
    box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth + 1);
  }
}

function openNamed() {
  const target = document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") {
    target.open = true;
    target.scrollIntoView();
  }
}

for (const details of document.querySelectorAll("details.cell")) {
  const host = details.querySelector(".charts");
  details.addEventListener("toggle", () => {
    if (details.open) drawCell(host); else host.replaceChildren();
  });
  if (details.open) drawCell(host);
}
window.addEventListener("hashchange", openNamed);
openNamed();
hintScrolling();

let resizing = 0, width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  clearTimeout(resizing);
  resizing = setTimeout(() => {
    document.querySelectorAll("details[open] .charts").forEach(drawCell);
    hintScrolling();
  }, 150);
});

function sortBy(button) {
  const head = button.closest("th"), table = head.closest("table");
  const column = head.cellIndex, numeric = button.dataset.sort === "number";
  const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : numeric;
  for (const other of table.querySelectorAll("[aria-sort]")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = table.tBodies[0];
  const text = (row) => row.cells[column].textContent;
  const missing = (row) => numeric && Number.isNaN(parseFloat(text(row)));
  const order = numeric ? (a, b) => parseFloat(text(a)) - parseFloat(text(b)) : (a, b) => text(a).localeCompare(text(b));
  const rows = [...body.rows].sort((a, b) => missing(a) - missing(b) || (down ? -1 : 1) * order(a, b));
  body.append(...rows);
}
for (const button of document.querySelectorAll("[data-sort]")) {
  button.addEventListener("click", () => sortBy(button));
}
